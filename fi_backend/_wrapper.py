"""What the batch wrappers share: their workspaces, one plan, and its run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
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
    planned_arguments,
    refuse,
    to_variant,
)
from fi_backend._page_table import check_fits, fill, own_copy, to_device
from fi_backend._rotated_keys import KeyRotation, split_rotation
from fi_backend.attention import PagedAttention
from fi_backend.batch import PagedBatch
from fi_backend.checks import check_tensor
from fi_backend.kernels import device_plan, host_plan
from fi_backend.outer_levels import OuterLevels
from fi_backend.planning import Plan, default_workers, plan, workspace_bytes
from fi_backend.spec import AttentionSpec, Geometry
from fi_backend.workspace import Workspace

__all__ = ["AttentionWrapper", "Scale"]

Scale = float | torch.Tensor | None
_MAX_LAYERS = 8  # kept; a model has one sm_scale, or a few


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
        refuse(self._name, jit_kwargs=jit_kwargs)
        self._variant = to_variant(self._name, jit_args)
        self._kv_layout = kv_layout
        self._use_cuda_graph = use_cuda_graph
        # With use_cuda_graph: spec and split_tokens of the first plan(), and a plan for each
        # geometry, since forward() may ask for others and must leave alone what a graph holds.
        self._fixed: tuple[AttentionSpec, int] | None = None
        self._fixed_plans: dict[Geometry, Plan] = {}
        self._spec: AttentionSpec | None = None
        self._plan: Plan | None = None
        self._rotation: KeyRotation | None = None
        self._max_qo_len: int | None = None  # of all that the layers below run
        # By what a run may still choose: whether there are sinks, and sm_scale.
        self._layers: dict[tuple[bool, float], PagedAttention] = {}
        self._alibi_slopes: torch.Tensor | None = None
        self._mask: torch.Tensor | None = None
        self._mask_indptr: torch.Tensor | None = None
        self._split_tokens = 0
        check_workspace(self._name, "float_workspace_buffer", float_workspace_buffer)
        self._workspace = Workspace(buffer=float_workspace_buffer)
        self._buffers: tuple[torch.Tensor, ...] = ()
        self._kv_lens: torch.Tensor | None = None

    @property
    def _device(self) -> torch.device:
        """Where the wrapper works: the device of its workspace."""
        return self._workspace.device

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

        Raises:
            ValueError: a buffer is malformed.
            RuntimeError: with use_cuda_graph, plan() has been called: a captured graph keeps the
                workspace of its capture.
        """
        self._check_workspaces(float_workspace_buffer, int_workspace_buffer)
        self._workspace = Workspace(buffer=float_workspace_buffer)

    def _check_workspaces(
        self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor
    ) -> None:
        """Refuse what reset_workspace_buffer() does."""
        if self._fixed is not None:
            raise RuntimeError(
                f"{self._name}: reset_workspace_buffer() must come before the first plan() with "
                f"use_cuda_graph, since a captured graph keeps its workspace. Make another wrapper"
            )
        check_workspace(self._name, "float_workspace_buffer", float_workspace_buffer)
        check_workspace(self._name, "int_workspace_buffer", int_workspace_buffer)
        if float_workspace_buffer.device != self._device:
            raise ValueError(
                f"float_workspace_buffer must be on {self._device}, as the first one; "
                f"got {float_workspace_buffer.device}"
            )

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
            check_tensor(
                name,
                buffer,
                shape=(None,),
                dtype=torch.int32,
                device=self._device,
                last_dim_contiguous=True,
            )
            checked.append(buffer)
        return tuple(checked)

    def _check_batch_size(self, batch_size: int, fixed: int) -> None:
        if batch_size != fixed:
            raise ValueError(
                f"The batch size should be fixed in cudagraph mode, the runtime batch size "
                f"{batch_size} mismatches the batch size set during initialization {fixed}. "
                f"Use a wrapper for each batch size"
            )

    def _check_spec(self, spec: AttentionSpec, split_tokens: int) -> None:
        """Refuse a plan() whose arguments this wrapper cannot take, or not any more.

        A captured run() has these arguments inside it, and would go on with the first ones.
        """
        if self._fixed is None or (spec, split_tokens) == self._fixed:
            return
        wanted = planned_arguments(spec, split_tokens)
        for name, first in planned_arguments(*self._fixed).items():
            if wanted[name] != first:
                raise ValueError(
                    f"{name} is fixed at {first} by the first plan() with use_cuda_graph; "
                    f"got {wanted[name]}. Make another wrapper for it"
                )

    def _check_staging(self, metadata: Mapping[str, torch.Tensor]) -> None:
        """Check that all of `metadata` can be copied to the fixed buffers."""
        for buffer, (name, tensor) in zip(self._buffers, metadata.items(), strict=True):
            check_fits(name, buffer, tensor)

    def _stage(self, non_blocking: bool, **metadata: torch.Tensor) -> list[torch.Tensor]:
        """Bring tensors to where runs read them, on the device.

        With use_cuda_graph that is all of each fixed buffer, since a graph keeps its address: a
        part of no elements has none. Without, runs read a GPU's tensors where they are, as
        FlashInfer's do; what is on the host is copied, on the CPU too.
        """
        if not self._use_cuda_graph:
            return [
                own_copy(name, tensor, self._device, non_blocking=non_blocking)
                for name, tensor in metadata.items()
            ]
        for buffer, (name, tensor) in zip(self._buffers, metadata.items(), strict=True):
            fill(name, buffer, tensor, non_blocking=non_blocking)
        return list(self._buffers)

    def _stage_lens(self, kv_lens: torch.Tensor) -> torch.Tensor:
        """Bring lengths to where runs read them; with use_cuda_graph, always to one place."""
        if not self._use_cuda_graph:
            return to_device("kv_lens", kv_lens, self._device)
        if self._kv_lens is None:
            self._kv_lens = torch.empty_like(kv_lens, device=self._device)
        return fill("kv_lens", self._kv_lens, kv_lens)

    def _workspace_size(self, spec: AttentionSpec, batch_size: int) -> tuple[int, int]:
        """Bytes of the float and of the integer workspace that a plan for `spec` needs."""
        spec = replace(spec, variant=self._variant)
        kernel_spec, _ = split_rotation(spec, self._device)
        planner = host_plan if self._device.type == "cpu" else device_plan
        int_bytes = 4 * planner.plan_buffer_ints(
            max_reqs=batch_size, num_workers=default_workers(self._device)
        )
        total = workspace_bytes(kernel_spec, batch_size, max_tokens=0, device=self._device)
        return total - int_bytes, int_bytes

    def _plan_batch(
        self,
        spec: AttentionSpec,
        batch: PagedBatch,
        *,
        num_tokens: int | None = None,
        split_tokens: int = 0,
        max_qo_len: int | None = None,
        mask: torch.Tensor | None = None,
        mask_indptr: torch.Tensor | None = None,
        outer: OuterLevels | None = None,
    ) -> None:
        """Plan a step and make every kernel it needs ready to launch.

        Args:
            spec: the layer.
            batch: on the workspace's device.
            num_tokens: query rows of the batch, where the host knows them and they hold for every
                replay of a graph: outputs made by run() then have no padding rows to clear.
            split_tokens: as for plan().
            max_qo_len: as for PagedAttention(); None makes the kernels of other steps ready, too.
            mask, mask_indptr: as for PagedAttention.run(), if spec.custom_mask.
            outer: as for plan().
        """
        if spec.variant != self._variant:
            spec = replace(spec, variant=self._variant)
        layers, rotation = self._layers, self._rotation
        kernel_spec = self._kernel_spec(spec)
        if spec != self._spec or max_qo_len != self._max_qo_len:
            kernel_spec, rotation = split_rotation(spec, self._device)
            layer = PagedAttention(kernel_spec, self._device, max_qo_len=max_qo_len)
            layers = {(spec.sinks, spec.sm_scale): layer}
            if rotation is not None:
                rotation.load(self._device)
        step = plan(
            kernel_spec,
            batch,
            self._workspace,
            into=self._fixed_plans.get(spec.geometry) if self._use_cuda_graph else self._plan,
            split_tokens=split_tokens,
            outer=outer,
            share_prefixes=False,  # the caller's workspace is as large as FlashInfer's has to be
        )
        if step.num_tokens is None and num_tokens is not None:
            step = replace(step, num_tokens=num_tokens)
        self._plan = step
        if self._use_cuda_graph:
            self._fixed_plans[spec.geometry] = step
            self._fixed = self._fixed or (spec, split_tokens)
        self._layers, self._rotation = layers, rotation
        self._spec, self._max_qo_len = spec, max_qo_len
        heads = spec.num_qo_heads
        if spec.alibi and (self._alibi_slopes is None or self._alibi_slopes.shape[0] != heads):
            # Kept from plan to plan, since a CUDA graph keeps its address.
            self._alibi_slopes = alibi_slopes(heads, self._device)
        self._mask = mask
        self._mask_indptr = mask_indptr
        self._split_tokens = split_tokens

    def _planned(self) -> tuple[AttentionSpec, Plan]:
        if self._spec is None or self._plan is None:
            raise RuntimeError(f"{self._name}: call plan() before run()")
        return self._spec, self._plan

    def _kernel_spec(self, planned: AttentionSpec) -> AttentionSpec:
        """Return what kernels run of the planned layer: its rotation may go before."""
        return planned if self._rotation is None else self._rotation.spec

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
        if changed != replace(spec, variant=None):
            self._plan_batch(
                changed,
                old.batch,
                num_tokens=old.num_tokens,
                split_tokens=self._split_tokens,
                max_qo_len=self._max_qo_len,
                mask=self._mask,
                mask_indptr=self._mask_indptr,
            )

    def _take_values(self, args: tuple[Any, ...]) -> dict[str, Any] | None:
        """Turn run()'s extra positional arguments into the variant's values, by name."""
        if self._variant is not None:
            return self._variant.values_by_name(args)
        refuse(self._name, args=args)
        return None

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
        variant_values: dict[str, Any] | None = None,
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
            changed = replace(self._kernel_spec(spec), sinks=key[0], sm_scale=key[1])
            layer = PagedAttention(changed, self._device, max_qo_len=self._max_qo_len)
            if len(self._layers) >= _MAX_LAYERS:
                del self._layers[next(iter(self._layers))]
            self._layers[key] = layer
        if self._rotation is not None:
            step, q, kv_cache = self._rotation.apply(step, q, kv_cache)
        return layer.run(
            step,
            q,
            kv_cache,
            out=out,
            lse=lse,
            return_lse=return_lse,
            alibi_slopes=self._alibi_slopes if spec.alibi else None,
            sinks=sinks,
            custom_mask=self._mask,
            mask_indptr=self._mask_indptr,
            k_scale=combine_scales((("q_scale", q_scale), ("k_scale", k_scale)), spec.num_kv_heads),
            v_scale=combine_scales((("v_scale", v_scale),), spec.num_kv_heads),
            variant_values=variant_values,
        )
