"""SGLang's attention backend: once a step plan, once a layer write the cache and run attention."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention

from fi_backend import (
    AttentionSpec,
    PagedAttention,
    PagedBatch,
    Workspace,
    compile_kernels,
    workspace_bytes,
)
from fi_backend.errors import UnsupportedError
from fi_backend.integrations.sglang import kv_cache
from fi_backend.integrations.sglang.graphs import CapturedSteps
from fi_backend.integrations.sglang.layer import BoundLayer, layer_spec
from fi_backend.integrations.sglang.metadata import (
    DraftStep,
    FIMetadata,
    QueryRows,
    StepRows,
)
from fi_backend.integrations.sglang.page_tables import TokenTable
from fi_backend.integrations.sglang.verify_mask import MaskBits, needs_mask

__all__ = ["FIAttnBackend"]

# Tokens between the places where a request's keys may be cut in deterministic mode.
_DETERMINISTIC_SPLIT = 2048


class FIAttnBackend(AttentionBackend):
    """Attention by fi_backend.

    Each instance has scratch memory of its own: SGLang runs several on different streams.

    Args:
        model_runner: SGLang's ModelRunner.
        workspace: scratch memory to share with an instance that never runs at the same time.
        draft_step: which of a draft model's steps this one's decode steps are; None if they are
            not.

    Raises:
        UnsupportedError: a layer of the model asks for what we do not have.
    """

    # Plans are made on the device: no copy of the lengths is read by the host.
    needs_cpu_seq_lens = False

    def __init__(
        self,
        model_runner: Any,
        *,
        workspace: Workspace | None = None,
        draft_step: DraftStep | None = None,
    ) -> None:
        super().__init__()
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.max_context_len = model_runner.model_config.context_len
        self.forward_metadata: FIMetadata | None = None
        self._page_size = model_runner.page_size
        slots = self.req_to_token_pool.req_to_token
        self.device = slots.device
        self._table = TokenTable(slots, self.token_to_kv_pool, self._page_size)
        self._rows = QueryRows(self.device, draft_step)
        self._workspace = Workspace(self.device) if workspace is None else workspace
        arguments = model_runner.server_args
        deterministic = getattr(arguments, "enable_deterministic_inference", False)
        self._split_tokens = _DETERMINISTIC_SPLIT if deterministic else 0
        # Without the radix cache every request has pages of its own.
        self._share_prefixes = not getattr(arguments, "disable_radix_cache", True)
        self._bound: dict[tuple[RadixAttention, torch.dtype, bool, bool], BoundLayer] = {}
        self._captured: CapturedSteps | None = None
        branches = 1 if draft_step is None else draft_step.num_branches
        self._prepare(model_runner, max_rows=slots.shape[0] * branches)

    def _prepare(self, model_runner: Any, max_rows: int) -> None:
        """Compile the model's kernels in one parallel build and reserve their scratch memory.

        Of the largest step, so that no step replaces what graphs were captured with.
        """
        specs = self._model_specs(model_runner)
        compile_kernels(specs, self.device, step_tables=True)
        for spec in specs:
            PagedAttention(spec, self.device)
            size = workspace_bytes(
                spec, max_rows, 0, device=self.device, split_tokens=self._split_tokens
            )
            self._workspace.partials(size // 4)

    def _model_specs(self, model_runner: Any) -> list[AttentionSpec]:
        modules = getattr(model_runner, "model", None)
        layers = (
            []
            if modules is None
            else [module for module in modules.modules() if isinstance(module, RadixAttention)]
        )
        specs = [
            layer_spec(
                layer,
                q_dtype=model_runner.dtype,
                kv_dtype=self.token_to_kv_pool.dtype,
                page_size=self._page_size,
                share_prefixes=self._share_prefixes,
            )
            for layer in layers
        ]
        return list(dict.fromkeys(specs))

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan a step that runs eagerly, or between the pieces of a breakable graph."""
        if forward_batch.batch_size == 0 or forward_batch.forward_mode.is_idle():
            self.forward_metadata = None
            return
        rows = self._rows.of(forward_batch)
        longest = _longest(forward_batch, rows)
        window_batch = window_slots = mask = None
        if self._table.is_page_table(rows):
            batch = self._table.batch(rows)
        else:
            batch, window_batch = self._table.tables(rows.num_rows, longest).gather(rows)
        slot_map = kv_cache.window_slots(self.token_to_kv_pool)
        if slot_map is not None:
            window_slots = slot_map[forward_batch.out_cache_loc]
        if needs_mask(forward_batch):
            max_keys = longest or self._table.slots.shape[1]
            bits = MaskBits(rows.num_rows, rows.extra_tokens, max_keys, self.device)
            mask = bits.pack(forward_batch.spec_info.custom_mask, batch.kv_lens)
        self.forward_metadata = self._step(batch, window_batch, window_slots, mask)

    def _step(
        self,
        batch: PagedBatch,
        window_batch: PagedBatch | None,
        window_out_slots: torch.Tensor | None,
        mask: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> FIMetadata:
        return FIMetadata(
            batch=batch,
            window_batch=window_batch,
            window_out_slots=window_out_slots,
            mask=mask,
            workspace=self._workspace,
            split_tokens=self._split_tokens,
        )

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Reserve what graphs of up to this many requests and query rows refer to."""
        self._captured = CapturedSteps(self._table, self._rows, self._step, max_bs, max_num_tokens)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Plan the step of a graph, before its capture and before each of its replays."""
        assert self._captured is not None, "init_cuda_graph_state() comes first"
        self.forward_metadata = self._captured.load(forward_batch)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Return the length of the requests that fill up a graph's batch."""
        return 1

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As forward_extend()."""
        return self.forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        *,
        sinks: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Write the step's keys and values, then attend to the cache, prefix and step in one call.

        Args:
            q: [num_tokens, num_qo_heads * head_dim_qk], or with its heads apart; any row stride.
            k: [num_tokens, num_kv_heads, head_dim_qk]; None if another layer has written the cache.
            v: as k, with the value head size.
            layer: the RadixAttention.
            forward_batch: the step; where to write, and maybe where to put the result.
            save_kv_cache: False if the cache has been written already.
            sinks: [num_qo_heads], a logit per query head that joins the softmax denominator.

        Returns:
            [num_tokens, num_qo_heads * head_dim_vo].

        Raises:
            UnsupportedError: the model asks for something that we do not have.
        """
        unknown = sorted(name for name, value in kwargs.items() if value is not None)
        if unknown:
            raise UnsupportedError(
                f"layer {layer.layer_id}: fi_backend takes no {', '.join(unknown)}; "
                f"start with another --attention-backend"
            )
        metadata = self.forward_metadata
        if metadata is None:
            return q.new_empty(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)
        if k is not None and v is not None and save_kv_cache:
            slots = forward_batch.out_cache_loc
            kv_cache.write(self.token_to_kv_pool, layer, k, v, slots, metadata.window_out_slots)
        bound = self._bind(layer, q.dtype, sinks is not None, metadata.mask is not None)
        rows = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = _output(forward_batch, rows, layer)
        mask, mask_indptr = metadata.mask or (None, None)
        bound.attention.run(
            metadata.plan_for(bound),
            rows,
            kv_cache.paged_views(self.token_to_kv_pool, layer.layer_id, self._page_size),
            out=out.view(-1, layer.tp_q_head_num, layer.v_head_dim),
            # In a graph this is a node: new weights reach the kernel without a new capture.
            sinks=None if sinks is None else sinks.to(torch.float32),
            custom_mask=mask,
            mask_indptr=mask_indptr,
            k_scale=(layer.k_scale_float or 1.0) if bound.scales_count else 1.0,
            v_scale=(layer.v_scale_float or 1.0) if bound.scales_count else 1.0,
        )
        return out

    def _bind(
        self, layer: RadixAttention, q_dtype: torch.dtype, sinks: bool, custom_mask: bool
    ) -> BoundLayer:
        key = (layer, q_dtype, sinks, custom_mask)
        found = self._bound.get(key)
        if found is None:
            found = self._bound[key] = BoundLayer.bind(
                layer,
                self.token_to_kv_pool,
                q_dtype=q_dtype,
                page_size=self._page_size,
                share_prefixes=self._share_prefixes,
                sinks=sinks,
                custom_mask=custom_mask,
            )
        return found


def _longest(forward_batch: Any, rows: StepRows) -> int | None:
    """Return the keys of the longest request where the host has them anyway."""
    lens = forward_batch.seq_lens_cpu
    return None if lens is None else int(lens.max()) + rows.extra_tokens


def _output(forward_batch: Any, rows: torch.Tensor, layer: Any) -> torch.Tensor:
    """Return where a layer's result goes: into the batch's own buffer if it has one that fits."""
    shape = (rows.shape[0], layer.tp_q_head_num * layer.v_head_dim)
    given = getattr(forward_batch, "_attn_output", None)
    if given is not None and given.shape == shape and given.dtype == rows.dtype:
        return given
    return rows.new_empty(shape)
