"""What the few-row and the many-row attention kernels have in common on the Python side."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fi_backend.jit import KernelSpec, build, load
from fi_backend.kernels import attention_variant, host_plan
from fi_backend.kernels.dtypes import cpp_type, short_name

__all__ = ["LineKernels", "call_count", "line_spec", "load_lines", "partial_floats"]

_kernels: dict[tuple[str, ...], LineKernels] = {}
_call_counts: dict[str, Callable[[], int]] = {}


def line_spec(
    name: str,
    *,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    o_dtype: torch.dtype,
    head_dim_qk: int,
    head_dim_vo: int,
    variant: attention_variant.Variant = None,
) -> KernelSpec:
    """Describe the module `name` ("decode" or "prefill") for one set of types and head sizes."""
    types = "_".join(short_name(dtype) for dtype in (q_dtype, kv_dtype, o_dtype))
    suffix = attention_variant.name_suffix(variant)
    parameters: dict[str, str | int] = {
        "q_type": cpp_type(q_dtype, "cpu"),
        "kv_type": cpp_type(kv_dtype, "cpu"),
        "out_type": cpp_type(o_dtype, "cpu"),
        "head_dim_qk": head_dim_qk,
        "head_dim_vo": head_dim_vo,
        **attention_variant.parameters(variant),
    }
    return KernelSpec(
        name=f"{name}_cpu_{types}_d{head_dim_qk}x{head_dim_vo}{suffix}",
        target="cpu",
        templates=(f"{name}_cpu.cc.j2",),
        parameters=tuple(sorted(parameters.items())),
    )


def partial_floats(
    *,
    num_workers: int,
    head_dim_qk: int,
    head_dim_vo: int,
    num_qo_heads: int = 1,
    num_kv_heads: int = 1,
) -> int:
    """Count the float32 elements of the workspace `partials`: it grows with workers alone.

    Args:
        num_workers: workers of the plan.
        head_dim_qk: size of a query or key row.
        head_dim_vo: size of a value or output row.
        num_qo_heads: ignored; head counts do not change the bound on the CPU.
        num_kv_heads: ignored.
    """
    return host_plan.workspace_floats(
        num_workers=num_workers, head_dim_qk=head_dim_qk, head_dim_vo=head_dim_vo
    )


class LineKernels:
    """Loaded attention modules that run one after the other; see `run`.

    Args:
        specs: the modules.
        beside: modules that are not loaded, but needed soon: they are compiled at the same time.
    """

    def __init__(self, specs: tuple[KernelSpec, ...], beside: tuple[KernelSpec, ...] = ()) -> None:
        build([*specs, *beside])
        modules = [load(spec) for spec in specs]
        self._runs: list[Callable[..., bool]] = [m.get_function("run") for m in modules]
        for spec, module in zip(specs, modules, strict=True):
            _call_counts.setdefault(spec.name, module.get_function("call_count"))

    def run(
        self,
        *,
        plan_buffer: torch.Tensor,
        partials: torch.Tensor,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        qo_indptr: torch.Tensor,
        kv_lens: torch.Tensor,
        page_indptr: torch.Tensor | None = None,
        page_indices: torch.Tensor | None = None,
        block_table: torch.Tensor | None = None,
        request_rows: torch.Tensor | None = None,
        max_qo_len: int | None = None,
        alibi_slopes: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        custom_mask: torch.Tensor | None = None,
        mask_indptr: torch.Tensor | None = None,
        q_rows: torch.Tensor | None = None,
        first_pages: torch.Tensor | None = None,
        first_rows: torch.Tensor | None = None,
        prior_out: torch.Tensor | None = None,
        prior_lse: torch.Tensor | None = None,
        prior_parts: torch.Tensor | None = None,
        k_scale: float | torch.Tensor = 1.0,
        v_scale: float | torch.Tensor = 1.0,
        sm_scale: float,
        logits_soft_cap: float = 0.0,
        window_left: int = -1,
        causal: bool = False,
        rope_scale: float = 1.0,
        rope_theta: float = 0.0,
        num_workers: int,
        members: tuple[torch.Tensor | float, ...] = (),
    ) -> None:
        """Attend for every request of these kernels' lines of the plan.

        Args:
            plan_buffer: int32, written by host_plan for these lengths.
            partials: float32 [partial_floats(...)] scratch.
            q: [num_rows, num_qo_heads, head_dim_qk]; rows of no request are not read.
            k_cache: [num_pages, page_size, num_kv_heads, head_dim_qk], last dim contiguous.
            v_cache: [num_pages, page_size, num_kv_heads, head_dim_vo], last dim contiguous.
            out: [num_rows, num_qo_heads, head_dim_vo]; rows of no request are not written. With
                q_rows, at least as many rows as those; a kernel that keeps parts of items writes
                prior_parts states of each row.
            lse: float32 [num_rows, num_qo_heads], base 2, sinks included; None if unwanted.
            qo_indptr: int32 [num_reqs + 1], as planned.
            kv_lens: int32 [num_reqs], as planned.
            page_indptr: int32 [num_reqs + 1]; with page_indices the CSR page table. Without
                page_indices and with page_size 1, token j of request r is page
                page_indptr[r] + j: ragged K and V.
            page_indices: int32 [page_indptr[-1]].
            block_table: int32 [*, max_pages], the other form of page table.
            request_rows: int32 or int64 [num_reqs], each request's row of block_table.
            max_qo_len: most query rows of a request; of no use here, where the plan tells at once.
            alibi_slopes: float32 [num_qo_heads]; adds slope * (key index - query index).
            sinks: float32 [num_qo_heads], logits that join the softmax denominator.
            custom_mask: uint8, little-endian bits [qo_len, kv_len] per request.
            mask_indptr: int32 [num_reqs + 1], each request's first byte of custom_mask.
            q_rows: int32 [rows of out], row of q for each row of out and lse; None if the same.
            first_pages: int32 [num_reqs], as planned: request r's kv_lens count from page
                first_pages[r] of its table on. Where that is not 0, rows of the few-row line begin
                with a prior state, of keys before; what depends on positions is not served then
                (ALiBi, custom masks, windows that hide keys, rope, variants).
            first_rows: int32 [num_reqs], the request's first row in prior_out and prior_lse.
                Without first_pages all rows begin with a prior state, on a GPU those of the few-row
                line.
            prior_out: float32 [* x prior_parts, num_qo_heads, head_dim_vo], contiguous; computed
                with v_scale 1 and without sinks.
            prior_lse: float32 [* x prior_parts, num_qo_heads], contiguous, base 2; -inf for a state
                that a row does not have.
            prior_parts: int32 [1], states of each row, one after the other, over parts of the keys.
            k_scale: factor on keys: a float, or float32 [num_kv_heads].
            v_scale: factor on values: a float, or float32 [num_kv_heads].
            sm_scale: factor on logits.
            logits_soft_cap: c > 0 turns logits into c * tanh(logit / c); 0 is off.
            window_left: as planned.
            causal: as planned.
            rope_scale: divides positions, where rope_theta is set.
            rope_theta: base of the rotary embedding of q and K inside the kernel; 0 is off.
            num_workers: as planned.
            members: tensors and scalars of the variant that the kernels were compiled for.

        Raises:
            TypeError, ValueError: an argument has a wrong dtype, shape or device, or differs from
                what was planned.
        """
        k_scales, k_value = (k_scale, 1.0) if isinstance(k_scale, torch.Tensor) else (None, k_scale)
        v_scales, v_value = (v_scale, 1.0) if isinstance(v_scale, torch.Tensor) else (None, v_scale)
        arguments = (
            q,
            k_cache,
            v_cache,
            out,
            lse,
            plan_buffer,
            partials,
            qo_indptr,
            kv_lens,
            page_indptr,
            page_indices,
            block_table,
            request_rows,
            alibi_slopes,
            sinks,
            custom_mask,
            mask_indptr,
            q_rows,
            first_pages,
            first_rows,
            prior_out,
            prior_lse,
            prior_parts,
            k_scales,
            v_scales,
            k_value,
            v_value,
            sm_scale,
            logits_soft_cap,
            window_left,
            causal,
            rope_scale,
            rope_theta,
            num_workers,
            *members,
        )
        # Each module tells whether the other line has work: most steps need one call.
        for run in self._runs:
            if not run(*arguments):
                return


def load_lines(specs: tuple[KernelSpec, ...], beside: tuple[KernelSpec, ...] = ()) -> LineKernels:
    """Load modules, once per process; compile missing ones in parallel.

    Arguments are those of LineKernels.
    """
    key = tuple(spec.name for spec in specs)
    kernels = _kernels.get(key)
    if kernels is None:
        kernels = _kernels[key] = LineKernels(specs, beside)
    return kernels


def call_count() -> int:
    """Count runs inside native code, over all attention modules this process has loaded."""
    return sum(int(count()) for count in _call_counts.values())
