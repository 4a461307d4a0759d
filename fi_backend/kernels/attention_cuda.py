"""Run a plan's lines on a CUDA device: specs of the attention modules, and their launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fi_backend.jit import KernelSpec, build, load
from fi_backend.kernels import attention_variant
from fi_backend.kernels.dtypes import cpp_type, short_name

__all__ = [
    "CudaLineKernels",
    "decode_spec",
    "few_rows_limit",
    "line_spec",
    "load_lines",
    "prefill_spec",
]

_kernels: dict[tuple[str, ...], CudaLineKernels] = {}


def line_spec(
    name: str,
    *,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    o_dtype: torch.dtype,
    head_dim_qk: int,
    head_dim_vo: int,
    more_templates: tuple[str, ...] = (),
    variant: attention_variant.Variant = None,
) -> KernelSpec:
    """Describe the CUDA module `name`, such as "decode", for one set of types and head sizes."""
    dtypes = {"q": q_dtype, "kv": kv_dtype, "out": o_dtype}
    types = {
        f"{tensor}_{side}_type": cpp_type(dtype, target)
        for tensor, dtype in dtypes.items()
        for side, target in (("device", "cuda"), ("host", "cpu"))
    }
    sizes = {"head_dim_qk": head_dim_qk, "head_dim_vo": head_dim_vo}
    code = attention_variant.parameters(variant)
    parameters: dict[str, str | int] = {**types, **sizes, **code}
    names = "_".join(short_name(dtype) for dtype in dtypes.values())
    return KernelSpec(
        name=f"{name}_cuda_{names}_d{head_dim_qk}x{head_dim_vo}"
        + attention_variant.name_suffix(variant),
        target="cuda",
        templates=(f"{name}_cuda.cu.j2", f"{name}_cuda_binding.cc.j2", *more_templates),
        parameters=tuple(sorted(parameters.items())),
    )


def decode_spec(
    *,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    o_dtype: torch.dtype,
    head_dim_qk: int,
    head_dim_vo: int,
    variant: attention_variant.Variant = None,
) -> KernelSpec:
    """Describe the few-row kernel.

    Args:
        q_dtype: float16 or bfloat16.
        kv_dtype: q_dtype, float8_e4m3fn or float8_e5m2.
        o_dtype: float32, float16 or bfloat16.
        head_dim_qk: size of a query or key row, a multiple of 32 up to 256.
        head_dim_vo: size of a value or output row, a multiple of 32 up to 256.
        variant: the C++ type of a custom variant, and its definition.
    """
    return line_spec(
        "decode",
        q_dtype=q_dtype,
        kv_dtype=kv_dtype,
        o_dtype=o_dtype,
        head_dim_qk=head_dim_qk,
        head_dim_vo=head_dim_vo,
        more_templates=("decode_cuda_some_blocks.cu.j2", "decode_cuda_all_blocks.cu.j2"),
        variant=variant,
    )


def few_rows_limit(head_dim_qk: int, head_dim_vo: int) -> int:
    """Return up to how many packed query rows of a request the few-row kernel computes it.

    Its module says so too, and is what runs go by; here nothing is compiled yet.

    Args:
        head_dim_qk: size of a query or key row.
        head_dim_vo: size of a value or output row.
    """
    return 32 if max(head_dim_qk, head_dim_vo) <= 128 else 16


def prefill_spec(
    *,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    o_dtype: torch.dtype,
    head_dim_qk: int,
    head_dim_vo: int,
    variant: attention_variant.Variant = None,
) -> KernelSpec:
    """Describe the many-row kernel.

    Args:
        q_dtype: float16 or bfloat16.
        kv_dtype: q_dtype, float8_e4m3fn or float8_e5m2.
        o_dtype: float32, float16 or bfloat16.
        head_dim_qk: size of a query or key row, a multiple of 32 up to 256.
        head_dim_vo: size of a value or output row, a multiple of 32 up to 256.
        variant: the C++ type of a custom variant, and its definition.
    """
    return line_spec(
        "prefill",
        q_dtype=q_dtype,
        kv_dtype=kv_dtype,
        o_dtype=o_dtype,
        head_dim_qk=head_dim_qk,
        head_dim_vo=head_dim_vo,
        variant=variant,
    )


class CudaLineKernels:
    """Loaded attention modules; see `run`.

    Args:
        specs: modules whose kernels are launched one after the other.
        mixed: nothing, or the module whose kernel replaces all of them in steps that may have many
            query rows, on devices that it has code for.
        beside: modules that are not loaded, but needed soon: they are compiled at the same time.
    """

    def __init__(
        self,
        specs: Sequence[KernelSpec],
        mixed: Sequence[KernelSpec] = (),
        beside: Sequence[KernelSpec] = (),
    ) -> None:
        build([*specs, *mixed, *beside])
        modules = [load(spec) for spec in specs]
        self._runs: list[Callable[..., None]] = [m.get_function("run") for m in modules]
        # Packed query rows of a request up to which the first kernel, for few rows, computes it;
        # 0 without that kernel.
        self.few_rows_limit = 0
        # And up to which that kernel has more than one thread block an SM.
        self._small_item_rows = 0
        if len(modules) > 1:
            self.few_rows_limit = modules[0].get_function("few_rows_limit")()
            self._small_item_rows = modules[0].get_function("small_item_rows")()
        self._mixed = [load(spec) for spec in mixed]
        self._mixed_runs: dict[int, list[Callable[..., None]]] = {}  # by device
        modules += self._mixed
        self._partial_floats: list[Callable[[int], int]] = [
            m.get_function("partial_floats") for m in modules
        ]
        self._invariant_partial_floats: list[Callable[[int], int]] = [
            m.get_function("invariant_partial_floats") for m in modules
        ]

    def partial_floats(self, *, num_workers: int, split: int = 0) -> int:
        """Count the float32 elements of the workspace `partials`: it grows with workers alone.

        Args:
            num_workers: thread blocks of the plan.
            split: as planned. A plan with split > 0 that finds less than this traps.
        """
        counts = self._invariant_partial_floats if split > 0 else self._partial_floats
        return max(int(count(num_workers)) for count in counts)

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
        enable_pdl: bool = True,
        members: tuple[torch.Tensor | float, ...] = (),
    ) -> None:
        """Attend for every request of these kernels' lines of the plan, on the current stream.

        All arguments but enable_pdl are those of :meth:`LineKernels.run`, with these differences:
        tensors are on one CUDA device; rows of q, k_cache and v_cache begin at multiples of 16
        bytes and rows of out at multiples of 4 elements; window_left and causal are those of the
        plan, which nobody can check here.

        Args:
            plan_buffer: written by device_plan, or by host_plan for "cuda". Its counters are used:
                a plan must not run on two streams at once.
            partials: float32 [partial_floats(...)] scratch.
            q: as there.
            k_cache: as there.
            v_cache: as there.
            out: as there.
            lse: as there.
            qo_indptr: as there.
            kv_lens: as there.
            page_indptr: as there.
            page_indices: as there.
            block_table: as there.
            request_rows: as there.
            max_qo_len: most query rows of a request, None if unknown. The many-row kernel is not
                launched if none can have as many as that needs.
            alibi_slopes: as there.
            sinks: as there.
            custom_mask: as there.
            mask_indptr: as there.
            q_rows: as there; must be None for kernels of the few-row line.
            first_pages: as there; above 0 for requests of the few-row line alone.
            first_rows: as there.
            prior_out: as there.
            prior_lse: as there.
            prior_parts: as there.
            k_scale: as there.
            v_scale: as there.
            sm_scale: as there.
            logits_soft_cap: as there.
            window_left: as there.
            causal: as there.
            rope_scale: as there.
            rope_theta: as there; must be 0 for kernels of the few-row line.
            num_workers: as planned.
            enable_pdl: launch as programmatic dependents of the kernel before.
            members: as there.

        Raises:
            TypeError, ValueError: an argument has a wrong dtype, shape, alignment or device.
            RuntimeError: CUDA refuses the launch.
        """
        k_scales, k_value = (k_scale, 1.0) if isinstance(k_scale, torch.Tensor) else (None, k_scale)
        v_scales, v_value = (v_scale, 1.0) if isinstance(v_scale, torch.Tensor) else (None, v_scale)
        runs: Sequence[Callable[..., None]] = self._runs
        if rope_theta == 0:  # else every request is of the second line
            most_rows = q.shape[0] if max_qo_len is None else min(q.shape[0], max_qo_len)
            group_size = q.shape[1] // k_cache.shape[2]
            runs = self._needed_runs(q, kv_lens.shape[0], most_rows, group_size)
        for run in runs:
            run(
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
                enable_pdl,
                *members,
            )

    def _needed_runs(
        self, q: torch.Tensor, num_reqs: int, most_rows: int, group_size: int
    ) -> Sequence[Callable[..., None]]:
        """Choose by what the host knows of a step: an empty launch costs microseconds too."""
        if most_rows * group_size <= self.few_rows_limit:
            return self._runs[:1]
        # As plan/work_line.h, has_few_rows(). What is not on a GPU at all, run() refuses.
        has_many_rows = q.shape[0] > num_reqs * (self._small_item_rows // group_size)
        if self._mixed and has_many_rows and q.is_cuda:
            device = q.get_device()
            if device not in self._mixed_runs:
                self._mixed_runs[device] = self._mixed_runs_on(device)
            return self._mixed_runs[device]
        return self._runs

    def _mixed_runs_on(self, device: int) -> list[Callable[..., None]]:
        """Return what runs both lines on a device."""
        found = [m for m in self._mixed if m.get_function("is_available")(device)]
        return [module.get_function("run") for module in found] or self._runs


def load_lines(
    specs: Sequence[KernelSpec],
    mixed: Sequence[KernelSpec] = (),
    beside: Sequence[KernelSpec] = (),
) -> CudaLineKernels:
    """Load modules, once per process; compile missing ones in parallel.

    Arguments are those of CudaLineKernels.
    """
    key = tuple(spec.name for spec in (*specs, *mixed))
    kernels = _kernels.get(key)
    if kernels is None:
        kernels = _kernels[key] = CudaLineKernels(specs, mixed, beside)
    return kernels
