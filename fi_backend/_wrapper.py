"""What the batch wrappers share: their workspaces, one plan, and its run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import torch

from fi_backend._arguments import (
    alibi_slopes,
    check_backend,
    check_layout,
    check_workspace,
    combine_scales,
    layer_spec,
    refuse,
)
from fi_backend.attention import PagedAttention
from fi_backend.batch import PagedBatch
from fi_backend.checks import check_cpu, check_tensor
from fi_backend.kernels import host_plan
from fi_backend.planning import Plan, plan, workspace_bytes
from fi_backend.spec import AttentionSpec
from fi_backend.workspace import Workspace

__all__ = ["AttentionWrapper", "Scale"]

Scale = float | torch.Tensor | None


class AttentionWrapper(ABC):
    """Base of the batch wrappers: plans with the core and runs what it planned."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str,
        use_cuda_graph: bool,
        backend: str,
        jit_args: list[Any] | None,
        jit_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self._name = type(self).__name__
        check_layout("kv_layout", kv_layout)
        check_backend(self._name, backend)
        refuse(self._name, jit_args=jit_args, jit_kwargs=jit_kwargs)
        self._kv_layout = kv_layout
        self._use_cuda_graph = use_cuda_graph
        self._spec: AttentionSpec | None = None
        self._plan: Plan | None = None
        # By what a run may still choose: whether there are sinks, and sm_scale.
        self._layers: dict[tuple[bool, float], PagedAttention] = {}
        self._alibi_slopes: torch.Tensor | None = None
        self._mask: torch.Tensor | None = None
        self._mask_indptr: torch.Tensor | None = None
        self._split_tokens = 0
        check_workspace(self._name, "float_workspace_buffer", float_workspace_buffer)
        self._workspace = Workspace(float_workspace_buffer.device, buffer=float_workspace_buffer)

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether plan() copies into buffers given to the constructor."""
        return self._use_cuda_graph

    def reset_workspace_buffer(
        self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor
    ) -> None:
        """Use another workspace from the next plan() on.

        Args:
            float_workspace_buffer: scratch of any dtype, 16-byte aligned. One that is too small is
                replaced by memory of the wrapper's own.
            int_workspace_buffer: any dtype, 16-byte aligned; a plan is kept in its own memory, so
                nothing is written here.
        """
        check_workspace(self._name, "float_workspace_buffer", float_workspace_buffer)
        check_workspace(self._name, "int_workspace_buffer", int_workspace_buffer)
        self._workspace = Workspace(float_workspace_buffer.device, buffer=float_workspace_buffer)

    @abstractmethod
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Attend over the planned batch; see each wrapper."""

    # A plain method, since torch.compile does not trace functools.partialmethod.
    def run_return_lse(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Call run() with return_lse=True; arguments as there."""
        state: tuple[torch.Tensor, torch.Tensor] = self.run(*args, **{"return_lse": True, **kwargs})
        return state

    def end_forward(self) -> None:  # noqa: B027 (empty on purpose)
        """Do nothing; kept for callers written against older versions."""

    def _fixed_buffers(self, **buffers: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Check the buffers that use_cuda_graph needs; none without it."""
        if not self._use_cuda_graph:
            return ()
        checked = []
        for name, buffer in buffers.items():
            if not isinstance(buffer, torch.Tensor):
                raise ValueError(
                    f"{name} should be a torch.Tensor in cudagraph mode; "
                    f"got {type(buffer).__name__}"
                )
            check_cpu(self._name, buffer.device)
            check_tensor(name, buffer, shape=(None,), dtype=torch.int32, last_dim_contiguous=True)
            checked.append(buffer)
        return tuple(checked)

    def _check_batch_size(self, batch_size: int, fixed: int) -> None:
        if batch_size != fixed:
            raise ValueError(
                f"The batch size should be fixed in cudagraph mode, the runtime batch size "
                f"{batch_size} mismatches the batch size set during initialization {fixed}. "
                f"Use a wrapper for each batch size"
            )

    def _workspace_size(self, spec: AttentionSpec, batch_size: int, rows: int) -> tuple[int, int]:
        """Bytes of the float and of the integer workspace that a plan for `spec` needs."""
        int_bytes = 4 * host_plan.plan_buffer_ints(
            max_reqs=batch_size, num_workers=torch.get_num_threads()
        )
        return workspace_bytes(spec, batch_size, rows) - int_bytes, int_bytes

    def _plan_batch(
        self,
        spec: AttentionSpec,
        batch: PagedBatch,
        *,
        split_tokens: int = 0,
        mask: torch.Tensor | None = None,
        mask_indptr: torch.Tensor | None = None,
    ) -> None:
        """Plan a step and make every kernel it needs ready to launch."""
        layers = {(spec.sinks, spec.sm_scale): PagedAttention(spec)}
        self._plan = plan(spec, batch, self._workspace, into=self._plan, split_tokens=split_tokens)
        self._spec = spec
        self._layers = layers
        self._alibi_slopes = alibi_slopes(spec.num_qo_heads) if spec.alibi else None
        self._mask = mask
        self._mask_indptr = mask_indptr
        self._split_tokens = split_tokens

    def _planned(self) -> tuple[AttentionSpec, Plan]:
        if self._spec is None or self._plan is None:
            raise RuntimeError(f"{self._name}: call plan() before run()")
        return self._spec, self._plan

    def _replan(self, **options: Any) -> None:
        """Change options of the planned layer, as the older forward() calls do at run time."""
        spec, old = self._planned()
        changed = layer_spec(
            num_qo_heads=spec.num_qo_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim_qk=spec.head_dim_qk,
            head_dim_vo=spec.head_dim_vo,
            page_size=spec.page_size,
            q_dtype=spec.q_dtype,
            kv_dtype=spec.kv_dtype,
            o_dtype=spec.o_dtype,
            custom_mask=spec.custom_mask,
            **options,
        )
        if changed != spec:
            self._plan_batch(
                changed,
                old.batch,
                split_tokens=self._split_tokens,
                mask=self._mask,
                mask_indptr=self._mask_indptr,
            )

    def _check_window(self, window_left: int | None) -> None:
        spec, _ = self._planned()
        if window_left is not None and window_left != spec.window_left:
            raise ValueError(
                f"window_left must be what plan() was given, {spec.window_left}; "
                f"got {window_left}. Plan again to change it"
            )

    def _run(
        self,
        q: torch.Tensor,
        kv_cache: tuple[torch.Tensor, torch.Tensor],
        *,
        out: torch.Tensor | None,
        lse: torch.Tensor | None,
        return_lse: bool,
        sinks: torch.Tensor | None = None,
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        sm_scale: float | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Launch the planned layer over `q` and a cache viewed as [pages, page, heads, dim]."""
        spec, step = self._planned()
        for name, tensor, plan_name, dtype in (
            ("q", q, "q_data_type", spec.q_dtype),
            ("k", kv_cache[0], "kv_data_type", spec.kv_dtype),
            ("v", kv_cache[1], "kv_data_type", spec.kv_dtype),
        ):
            if tensor.dtype != dtype:
                raise ValueError(
                    f"The dtype of {name} {tensor.dtype} does not match the {plan_name} {dtype} "
                    f"specified in plan function."
                )
        key = (sinks is not None, spec.sm_scale if sm_scale is None else float(sm_scale))
        layer = self._layers.get(key)
        if layer is None:
            layer = PagedAttention(replace(spec, sinks=key[0], sm_scale=key[1]))
            self._layers[key] = layer
        return layer.run(
            step,
            q,
            kv_cache,
            out=out,
            lse=lse,
            return_lse=return_lse,
            alibi_slopes=self._alibi_slopes,
            sinks=sinks,
            custom_mask=self._mask,
            mask_indptr=self._mask_indptr,
            k_scale=combine_scales((("q_scale", q_scale), ("k_scale", k_scale)), spec.num_kv_heads),
            v_scale=combine_scales((("v_scale", v_scale),), spec.num_kv_heads),
        )
