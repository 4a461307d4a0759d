"""PagedAttention: run one attention layer over a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from fi_backend import env
from fi_backend.attention_op import run_traced
from fi_backend.batch import PagedBatch
from fi_backend.checks import check_mask_offsets, check_page_ids, check_tensor, unpack_cache
from fi_backend.errors import UnsupportedError
from fi_backend.kernels import attention as attention_kernels
from fi_backend.outer_levels import OuterStates
from fi_backend.planning import Plan
from fi_backend.spec import AttentionSpec, supports
from fi_backend.torch_ops import runs_directly

__all__ = ["PagedAttention", "check_used_pages", "runtime_counters"]


def runtime_counters() -> dict[str, int]:
    """Count what native code has run in this process: {"attention_runs": n}.

    attention_runs: runs of a layer, counted in the native code that starts or launches them. On a
    GPU the capture of a CUDA graph counts, its replays do not.
    """
    return {"attention_runs": attention_kernels.call_count()}


def check_used_pages(plan: Plan, num_pages: int) -> None:
    """Check every page id that the batch's lengths make the kernels read.

    Raises:
        RuntimeError: a CUDA graph is being captured.
        ValueError: an id is out of range.
    """
    batch = plan.batch
    if batch.kv_lens.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{env.CHECKED.name}=1 reads page ids on the host, which a CUDA graph cannot hold; "
            f"unset it, or run without CUDA graphs"
        )
    if isinstance(plan.shares, OuterStates):
        for level in plan.shares.outer.levels:
            _check_pages(level, plan.geometry.page_size, num_pages)
    _check_pages(batch, plan.geometry.page_size, num_pages)


def _check_pages(batch: PagedBatch, page_size: int, num_pages: int) -> None:
    used = (batch.kv_lens.to(torch.int64) + page_size - 1) // page_size
    for request in range(batch.num_requests):
        count = int(used[request])
        if batch.block_table is not None:
            row = request if batch.request_rows is None else int(batch.request_rows[request])
            check_page_ids(
                f"block_table[{row}]", batch.block_table[row, :count], num_pages=num_pages
            )
        elif batch.page_indices is not None:
            assert batch.page_indptr is not None
            first = int(batch.page_indptr[request])
            ids = batch.page_indices[first : first + count]
            check_page_ids(f"page_indices of request {request}", ids, num_pages=num_pages)


class PagedAttention:
    """Attention of one layer over a paged cache (or ragged keys and values).

    The constructor compiles or loads the kernels, so that run() only launches them.

    Args:
        spec: the layer.
        device: where it runs.
        max_qo_len: the most that batches of its plans promise as their max_qo_len; None for any
            batch. Where the few-row kernel of a GPU takes as many rows, no other is compiled.

    Raises:
        UnsupportedError: `spec` is not supported; the message says what is.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        device: torch.device | str = "cpu",
        *,
        max_qo_len: int | None = None,
    ) -> None:
        reason = supports(spec, torch.device(device).type)
        if reason is not None:
            raise UnsupportedError(f"PagedAttention: {reason}")
        self.spec = spec
        self._geometry = spec.geometry
        self._has_no_options = not (spec.alibi or spec.sinks or spec.custom_mask)
        on_gpu = torch.device(device).type == "cuda"
        self._kernels = attention_kernels.load(
            device_type=torch.device(device).type,
            with_groups=on_gpu and self._geometry.shares_prefixes,
            max_rows=None if max_qo_len is None else max_qo_len * spec.group_size,
            **spec.kernel_types,
        )
        self._max_qo_len = max_qo_len
        self._checked = env.CHECKED.get()

    def run(
        self,
        plan: Plan,
        q: torch.Tensor,
        kv_cache: tuple[torch.Tensor, torch.Tensor],
        *,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        alibi_slopes: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        custom_mask: torch.Tensor | None = None,
        mask_indptr: torch.Tensor | None = None,
        k_scale: float | torch.Tensor = 1.0,
        v_scale: float | torch.Tensor = 1.0,
        variant_values: Mapping[str, torch.Tensor | float] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Compute attention for every query row of the plan's batch.

        Args:
            plan: made for this spec's geometry.
            q: [num_rows, num_qo_heads, head_dim_qk], spec.q_dtype; rows from plan.num_tokens on
                are padding.
            kv_cache: (k, v), each [num_pages, page_size, num_kv_heads, head_dim], any strides but
                the last; for a ragged batch [num_tokens, 1, num_kv_heads, head_dim].
            out: [num_rows, num_qo_heads, head_dim_vo], spec.o_dtype; padding rows are left alone.
                Allocated if None; padding rows are then 0.
            lse: float32 [num_rows, num_qo_heads], log base 2 of the softmax denominator (sinks
                included), -inf for a row that sees no key. Allocated if None and return_lse.
            return_lse: return (out, lse).
            alibi_slopes: float32 [num_qo_heads], if spec.alibi.
            sinks: float32 [num_qo_heads], logits (natural units), if spec.sinks.
            custom_mask: uint8, bits packed little endian, qo_len x kv_len per request, each
                request at its own byte, if spec.custom_mask.
            mask_indptr: int32 [num_reqs + 1], first byte of each request in custom_mask.
            k_scale: factor on keys: a float, or float32 [num_kv_heads].
            v_scale: factor on values: a float, or float32 [num_kv_heads].
            variant_values: the tensors, contiguous, and scalars of spec.variant by name. A CUDA
                graph keeps addresses of the tensors, and the scalars.

        Raises:
            TypeError, ValueError: an argument does not fit the spec or the plan.
        """
        k, v = unpack_cache("kv_cache", kv_cache)
        is_direct = runs_directly("attention", q=q)
        self._check_options(plan, alibi_slopes, sinks, custom_mask, mask_indptr)
        members: tuple[Any, ...] = ()
        if self.spec.variant is not None or variant_values is not None:
            members = self._members(variant_values, is_direct, lse is not None or return_lse)
        if not is_direct or self._checked or not self._fits(plan, q, k):
            self._check_tensors(plan, q, k, v, out, lse)
        if out is None or return_lse:
            out, lse = self._outputs(plan, q, out, lse, return_lse)
        spec, geometry, batch = self.spec, self._geometry, plan.batch
        launch: Callable[..., None] = self._kernels.run
        if not is_direct:
            launch = partial(run_traced, many_rows_only=spec.batch_invariant)
        lens = {"kv_lens": batch.kv_lens}
        partials, shares = plan.partials, plan.shares
        try:
            if shares is not None and shares.is_active:
                partials = shares.partials
                lens = shares.run(
                    None if is_direct else run_traced,
                    spec=spec,
                    q=q,
                    kv_cache=kv_cache,
                    k_scale=k_scale,
                    num_workers=plan.num_workers,
                )
            launch(
                plan_buffer=plan.buffer,
                partials=partials,
                q=q,
                k_cache=k,
                v_cache=v,
                out=out,
                lse=lse,
                qo_indptr=batch.qo_indptr,
                **lens,
                page_indptr=batch.page_indptr,
                page_indices=batch.page_indices,
                block_table=batch.block_table,
                request_rows=batch.request_rows,
                max_qo_len=batch.max_qo_len,
                alibi_slopes=alibi_slopes,
                sinks=sinks,
                custom_mask=custom_mask,
                mask_indptr=mask_indptr,
                k_scale=k_scale,
                v_scale=v_scale,
                sm_scale=spec.sm_scale,
                logits_soft_cap=spec.logits_soft_cap,
                window_left=geometry.window_left,
                causal=geometry.causal,
                rope_scale=spec.rope_scale,
                rope_theta=spec.rope_theta,
                num_workers=plan.num_workers,
                members=members,
            )
        except (TypeError, ValueError):
            # The native code has refused; say why in the terms of this call if we can.
            self._check_tensors(plan, q, k, v, out, lse)
            for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
                if not isinstance(scale, (float, int, torch.Tensor)):
                    raise TypeError(
                        f"{name} must be a float or a torch.Tensor; got {type(scale).__name__}"
                    ) from None
            raise
        return (out, lse) if return_lse and lse is not None else out

    def _fits(self, plan: Plan, q: torch.Tensor, k: torch.Tensor) -> bool:
        """Whether plan, q and cache are for this layer: what native code does not check."""
        if plan.geometry is not self._geometry or not isinstance(k, torch.Tensor):
            return False
        if self._max_qo_len is not None and not self._keeps_promise(plan):
            return False
        # Index by index: one slice of a torch.Size costs as much as all of these reads.
        spec, q_sizes, k_sizes = self.spec, q.shape, k.shape
        return (
            len(q_sizes) == 3
            and q_sizes[0] >= (plan.num_tokens or 0)
            and q_sizes[1] == spec.num_qo_heads
            and len(k_sizes) == 4
            and k_sizes[0] >= plan.num_ragged_rows
            and k_sizes[1] == spec.page_size
            and k_sizes[2] == spec.num_kv_heads
        )

    def _keeps_promise(self, plan: Plan) -> bool:
        most, promised = self._max_qo_len, plan.batch.max_qo_len
        return most is None or (promised is not None and promised <= most)

    def _check_tensors(
        self,
        plan: Plan,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor | None,
        lse: torch.Tensor | None,
    ) -> None:
        """Refuse what native code would refuse, or not see, naming the caller's argument."""
        spec = self.spec
        if plan.geometry != self._geometry:
            raise ValueError(
                f"plan was made for {plan.geometry}; this layer has {self._geometry}. "
                f"Plan again with this layer's spec"
            )
        if not self._keeps_promise(plan):
            raise ValueError(
                f"plan must be of a batch whose max_qo_len is at most {self._max_qo_len}, as this "
                f"layer was made with; got {plan.batch.max_qo_len}"
            )
        device = plan.batch.device
        check_tensor(
            "q",
            q,
            shape=(None, spec.num_qo_heads, spec.head_dim_qk),
            dtype=spec.q_dtype,
            device=device,
            last_dim_contiguous=True,
        )
        if plan.num_tokens is not None and q.shape[0] < plan.num_tokens:
            raise ValueError(
                f"q must have at least {plan.num_tokens} rows, qo_indptr[-1] at plan time; "
                f"got {q.shape[0]}"
            )
        for name, cache, head_dim in (("k", k, spec.head_dim_qk), ("v", v, spec.head_dim_vo)):
            check_tensor(
                name,
                cache,
                shape=(None, spec.page_size, spec.num_kv_heads, head_dim),
                dtype=spec.kv_dtype,
                device=device,
                last_dim_contiguous=True,
            )
        if k.shape[0] != v.shape[0]:
            raise ValueError(f"k and v must have as many pages; got {k.shape[0]} and {v.shape[0]}")
        if k.shape[0] < plan.num_ragged_rows:
            raise ValueError(
                f"k and v must have at least {plan.num_ragged_rows} rows, page_indptr[-1] at plan "
                f"time; got {k.shape[0]}"
            )
        rows, heads = q.shape[0], spec.num_qo_heads
        if out is not None:
            check_tensor(
                "out",
                out,
                shape=(rows, heads, spec.head_dim_vo),
                dtype=spec.o_dtype,
                device=device,
                last_dim_contiguous=True,
            )
        if lse is not None:
            check_tensor("lse", lse, shape=(rows, heads), dtype=torch.float32, device=device)
        if self._checked:
            check_used_pages(plan, k.shape[0])

    def _check_options(
        self,
        plan: Plan,
        alibi_slopes: torch.Tensor | None,
        sinks: torch.Tensor | None,
        custom_mask: torch.Tensor | None,
        mask_indptr: torch.Tensor | None,
    ) -> None:
        is_plain = alibi_slopes is None and sinks is None and mask_indptr is None
        if is_plain and custom_mask is None and self._has_no_options:
            return
        spec = self.spec
        device = plan.batch.device
        for name, value, wanted in (
            ("alibi_slopes", alibi_slopes, spec.alibi),
            ("sinks", sinks, spec.sinks),
            ("custom_mask", custom_mask, spec.custom_mask),
            ("mask_indptr", mask_indptr, spec.custom_mask),
        ):
            if (value is not None) != wanted:
                flag = "custom_mask" if "mask" in name else name.removesuffix("_slopes")
                need = f"is needed because spec.{flag} is True" if wanted else "must be None"
                raise ValueError(f"{name} {need}; got {None if value is None else 'a tensor'}")
        heads = (spec.num_qo_heads,)
        if alibi_slopes is not None:
            check_tensor(
                "alibi_slopes", alibi_slopes, shape=heads, dtype=torch.float32, device=device
            )
        if sinks is not None:
            check_tensor("sinks", sinks, shape=heads, dtype=torch.float32, device=device)
        if custom_mask is not None and mask_indptr is not None:
            check_tensor(
                "custom_mask", custom_mask, shape=(None,), dtype=torch.uint8, device=device
            )
            requests = plan.batch.num_requests
            check_tensor(
                "mask_indptr", mask_indptr, shape=(requests + 1,), dtype=torch.int32, device=device
            )
            # A compiler sees no values, and reading one on a device would wait for it.
            if mask_indptr.is_cpu and not torch.compiler.is_compiling():
                batch = plan.batch
                check_mask_offsets(mask_indptr, batch.qo_indptr, batch.kv_lens, len(custom_mask))

    def _members(
        self, values: Mapping[str, Any] | None, is_direct: bool, wants_lse: bool
    ) -> tuple[Any, ...]:
        """Put a run's values in the order of the variant's members; refuse what it cannot have."""
        variant = self.spec.variant
        if variant is None:
            raise ValueError("variant_values must be None: spec.variant is None")
        if not is_direct:
            raise UnsupportedError(
                f"PagedAttention: variant {variant.name} runs eagerly and in CUDA graphs; under "
                f"torch.compile, exclude the call with torch.compiler.disable"
            )
        if wants_lse and not variant.use_softmax:
            raise ValueError(
                f"lse and return_lse must be None and False: variant {variant.name} does not use "
                f"softmax, whose denominators they are"
            )
        return variant.members(values)

    def _outputs(
        self,
        plan: Plan,
        q: torch.Tensor,
        out: torch.Tensor | None,
        lse: torch.Tensor | None,
        return_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Allocate what the caller wants but did not give; padding rows are empty states."""
        rows, heads = q.shape[0], self.spec.num_qo_heads
        first_padding = plan.num_tokens or 0  # 0 if only the device knows
        if out is None:
            shape = (rows, heads, self.spec.head_dim_vo)
            out = torch.empty(shape, dtype=self.spec.o_dtype, device=q.device)
            if first_padding < rows:
                out[first_padding:].zero_()
        if lse is None and return_lse:
            lse = torch.empty((rows, heads), dtype=torch.float32, device=q.device)
            if first_padding < rows:
                lse[first_padding:] = float("-inf")
        return out, lse
