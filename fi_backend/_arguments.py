"""What FlashInfer-shaped arguments mean in terms of the core: dtypes, layouts, scales, specs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fi_backend.errors import UnsupportedError
from fi_backend.spec import AttentionSpec
from fi_backend.variants import AttentionVariant

__all__ = [
    "PagedCache",
    "alibi_slopes",
    "check_backend",
    "check_device",
    "check_layout",
    "check_workspace",
    "combine_scales",
    "layer_spec",
    "planned_arguments",
    "ragged_cache",
    "refuse",
    "split_paged_cache",
    "split_tokens",
    "to_dtype",
    "to_variant",
]

PagedCache = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

_DEVICE_TYPES = ("cpu", "cuda")
_LAYOUTS = ("NHD", "HND")
_POSITION_MODES = ("NONE", "ROPE_LLAMA", "ALIBI")
# Kernel families of FlashInfer that compute what ours does. The others have argument forms or
# layouts of their own, so a caller that asks for one of them means something else.
_BACKENDS = ("auto", "fa2", "fa3")
_BACKENDS_OF = {"trtllm_batch_decode_with_kv_cache": ("auto", "trtllm-gen", "xqa")}
_DEFAULT_ROPE_THETA = 1e4
_WORKSPACE_ALIGNMENT = 16

_NEXT_STEPS = {
    "jit_kwargs": "a variant in jit_args says all",
    "args": "only a variant takes values, and BatchAttentionWithAttentionSinkWrapper a sink",
    "kv_cache_sf": "NVFP4 caches are not supported; use a 16-bit or an fp8 cache",
    "skip_softmax_threshold_scale_factor": "every key is computed exactly",
    "use_fp16_softmax": "softmax is computed in float32",
    "uses_spcompress": "compressed caches are not supported",
    "block_tables": "the CSR page table already says it; to use a block table, see PagedBatch",
    "enable_block_sparse_attention": "a row attends to all of its request's pages",
    "mask": "a request's rows see each other causally; BatchPrefillWithPagedKVCacheWrapper takes "
    "a custom_mask",
    "o_sf_scale": "NVFP4 outputs are not supported; scale the result",
    "o_sf_vec_size": "NVFP4 outputs are not supported; scale the result",
    "o_scale": "fp8 outputs are not supported; scale the result",
    "scale_q": "fp8 queries are not supported; use bfloat16, and q_scale if there is one",
    "scale_k": "fp8 queries are not supported; pass k_scale for an fp8 cache",
    "scale_v": "fp8 queries are not supported; pass v_scale for an fp8 cache",
    "profiler_buffer": "there is no in-kernel profiler",
    "use_profiler": "there is no in-kernel profiler",
    "window_right": "only left windows exist; causal=True hides the keys to the right",
    "prefix_len_ptr": "multi-item scoring is not supported; pass custom_mask",
    "token_pos_in_items_ptr": "multi-item scoring is not supported; pass custom_mask",
    "token_pos_in_items_len": "multi-item scoring is not supported; pass custom_mask",
    "max_item_len_ptr": "multi-item scoring is not supported; pass custom_mask",
}


def refuse(operation: str, **arguments: object) -> None:
    """Refuse arguments that ask for something this version does not do.

    None, False, 0 and () ask for nothing.

    Raises:
        UnsupportedError: one of them asks for something; the message says what to do instead.
    """
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            shown = f"a tensor of shape {list(value.shape)}"
        elif value:
            shown = repr(value) if len(repr(value)) < 60 else f"a {type(value).__name__}"
        else:
            continue
        raise UnsupportedError(
            f"{operation}: {name} is not supported; got {shown}, expected it left at its default "
            f"({_NEXT_STEPS[name]})"
        )


def to_dtype(name: str, value: str | torch.dtype | None, default: torch.dtype) -> torch.dtype:
    """Turn "bfloat16" or torch.bfloat16 into the dtype; None into `default`."""
    if value is None:
        return default
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f'{name} must be a torch.dtype or its name, as "bfloat16"; got {value!r}')
    return dtype


def to_variant(operation: str, jit_args: Sequence[object] | None) -> AttentionVariant | None:
    """Return the variant that jit_args holds.

    Raises:
        UnsupportedError: it holds something else.
    """
    if jit_args is None:
        return None
    if isinstance(jit_args, (list, tuple)) and len(jit_args) == 1:
        (variant,) = jit_args
        if isinstance(variant, AttentionVariant):
            return variant
    raise UnsupportedError(
        f"{operation}: jit_args must be [fi_backend.AttentionVariant(...)]; got "
        f"{type(jit_args).__name__}. FlashInfer's variants are C++ for its own headers: see "
        f"docs/attention-variants.md for what to write instead"
    )


def check_layout(name: str, kv_layout: str) -> None:
    if kv_layout not in _LAYOUTS:
        raise ValueError(f"{name} must be one of {', '.join(_LAYOUTS)}; got {kv_layout!r}")


def check_backend(operation: str, backend: str) -> None:
    """Accept the backends whose semantics ours has; one implementation serves all of them."""
    backends = _BACKENDS_OF.get(operation, _BACKENDS)
    if backend not in backends:
        raise UnsupportedError(
            f"{operation}: backend must be one of {', '.join(backends)}; got {backend!r}. "
            f'Use "auto"'
        )


def check_device(operation: str, device: torch.device) -> None:
    """Refuse a device that no kernel serves."""
    if device.type not in _DEVICE_TYPES:
        raise UnsupportedError(
            f"{operation}: device must be {' or '.join(_DEVICE_TYPES)}; got {device}"
        )


def check_workspace(operation: str, name: str, buffer: torch.Tensor) -> None:
    """Check device and alignment of a caller's workspace."""
    if not isinstance(buffer, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(buffer).__name__}")
    check_device(operation, buffer.device)
    if buffer.numel() and not buffer.is_contiguous():
        raise ValueError(f"{name} must be contiguous; got strides {buffer.stride()}")
    if buffer.numel() and buffer.data_ptr() % _WORKSPACE_ALIGNMENT:
        raise ValueError(
            f"{name} must be {_WORKSPACE_ALIGNMENT}-byte aligned; got an address that is "
            f"{buffer.data_ptr() % _WORKSPACE_ALIGNMENT} bytes past an aligned one"
        )


def alibi_slopes(num_heads: int, device: torch.device) -> torch.Tensor:
    """Slopes of ALiBi: float32 [num_heads].

    With n the largest power of two that is at most num_heads, the first n heads take the powers
    of 2^(-8/n), the rest the odd powers of its square root.
    """
    base_heads = 2 ** int(math.log2(num_heads))
    ratio = 8.0 / base_heads
    # Made on the device: a CUDA graph cannot hold a copy from the host.
    head = torch.arange(num_heads, dtype=torch.float64, device=device)
    coarse, fine = (head[:base_heads] + 1) * ratio, (head[: num_heads - base_heads] + 0.5) * ratio
    return torch.exp2(-torch.cat((coarse, fine))).to(torch.float32)


def layer_spec(
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim_qk: int,
    head_dim_vo: int | None,
    page_size: int,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    o_dtype: torch.dtype,
    causal: bool,
    pos_encoding_mode: str,
    window_left: int,
    logits_soft_cap: float | None,
    sm_scale: float | None,
    rope_scale: float | None,
    rope_theta: float | None,
    custom_mask: bool = False,
    sinks: bool = False,
) -> AttentionSpec:
    """Build the spec that FlashInfer's arguments describe, its defaults filled in."""
    if pos_encoding_mode not in _POSITION_MODES:
        raise ValueError(
            f"pos_encoding_mode must be one of {', '.join(_POSITION_MODES)}; "
            f"got {pos_encoding_mode!r}"
        )
    theta = _DEFAULT_ROPE_THETA if rope_theta is None else float(rope_theta)
    rotate = pos_encoding_mode == "ROPE_LLAMA"
    scale = 1.0 if rope_scale is None else float(rope_scale)
    for name, value in (("rope_theta", theta), ("rope_scale", scale)):
        if rotate and not 0.0 < value < math.inf:
            raise ValueError(f"{name} must be finite and above 0; got {value}")
    return AttentionSpec(
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim_qk=head_dim_qk,
        head_dim_vo=head_dim_qk if head_dim_vo is None else head_dim_vo,
        q_dtype=q_dtype,
        kv_dtype=kv_dtype,
        o_dtype=o_dtype,
        page_size=page_size,
        causal=causal and not custom_mask,
        window_left=window_left,
        logits_soft_cap=_soft_cap(logits_soft_cap),
        sm_scale=1.0 / math.sqrt(max(head_dim_qk, 1)) if sm_scale is None else float(sm_scale),
        alibi=pos_encoding_mode == "ALIBI",
        sinks=sinks,
        custom_mask=custom_mask,
        rope_theta=theta if rotate else 0.0,
        rope_scale=scale if rotate else 1.0,
    )


def _soft_cap(logits_soft_cap: float | None) -> float:
    """Return FlashInfer's soft cap as a spec has it: 0 for none, where a caller may say -1 too."""
    if logits_soft_cap is None or logits_soft_cap <= 0.0:
        return 0.0
    return float(logits_soft_cap)


def split_tokens(fixed_split_size: int | None, disable_split_kv: bool, page_size: int) -> int:
    """Where plan() may cut a request's keys: see its `split_tokens`."""
    if disable_split_kv:
        return -1
    if fixed_split_size is None or fixed_split_size == -1:
        return 0
    if fixed_split_size < 1:
        raise ValueError(f"fixed_split_size must be at least 1 page; got {fixed_split_size}")
    return fixed_split_size * page_size


def planned_arguments(spec: AttentionSpec, split_tokens: int) -> dict[str, object]:
    """Name what plan() was given, as its callers do: the reverse of layer_spec and split_tokens."""
    mode = "ALIBI" if spec.alibi else "ROPE_LLAMA" if spec.rope_theta > 0 else "NONE"
    return {
        "num_qo_heads": spec.num_qo_heads,
        "num_kv_heads": spec.num_kv_heads,
        "head_dim_qk": spec.head_dim_qk,
        "head_dim_vo": spec.head_dim_vo,
        "page_size": spec.page_size,
        "q_data_type": spec.q_dtype,
        "kv_data_type": spec.kv_dtype,
        "o_data_type": spec.o_dtype,
        "custom_mask": "a mask" if spec.custom_mask else None,
        "causal": spec.causal,
        "pos_encoding_mode": mode,
        "window_left": spec.window_left,
        "logits_soft_cap": spec.logits_soft_cap,
        "sm_scale": spec.sm_scale,
        "rope_scale": spec.rope_scale,
        "rope_theta": spec.rope_theta,
        "fixed_split_size": split_tokens // spec.page_size if split_tokens > 0 else None,
        "disable_split_kv": split_tokens < 0,
    }


def split_paged_cache(
    name: str, cache: PagedCache, kv_layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """View a paged cache as (k, v), each [num_pages, page_size, num_kv_heads, head_dim].

    One tensor holds both, [num_pages, 2, ...]; a pair holds one each. The page_size dimension may
    be left out where it is 1.
    """
    if isinstance(cache, torch.Tensor):
        if cache.dim() not in (4, 5) or cache.shape[1] != 2:
            raise ValueError(
                f"{name} must be a pair of tensors, or one tensor [num_pages, 2, ...] of 5 "
                f"dimensions (4 if page_size is 1); got shape {list(cache.shape)}"
            )
        k, v = cache[:, 0], cache[:, 1]
    elif isinstance(cache, (tuple, list)) and len(cache) == 2:
        k, v = cache
    else:
        raise TypeError(f"{name} must be a tensor or a pair of tensors; got {type(cache).__name__}")
    return _as_nhd(f"{name}'s keys", k, kv_layout), _as_nhd(f"{name}'s values", v, kv_layout)


def _as_nhd(name: str, cache: torch.Tensor, kv_layout: str) -> torch.Tensor:
    if not isinstance(cache, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(cache).__name__}")
    if cache.dim() == 3:
        return cache.unsqueeze(1)
    if cache.dim() != 4:
        raise ValueError(
            f"{name} must have 4 dimensions (3 if page_size is 1); got shape {list(cache.shape)}"
        )
    return cache.transpose(1, 2) if kv_layout == "HND" else cache


def ragged_cache(name: str, tensor: torch.Tensor, kv_layout: str) -> torch.Tensor:
    """View ragged keys or values as a cache of one-token pages, [num_tokens, 1, heads, dim]."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.dim() != 3:
        wanted = "num_tokens, num_kv_heads" if kv_layout == "NHD" else "num_kv_heads, num_tokens"
        raise ValueError(f"{name} must have shape [{wanted}, head_dim]; got {list(tensor.shape)}")
    return (tensor.transpose(0, 1) if kv_layout == "HND" else tensor).unsqueeze(1)


def combine_scales(
    scales: Sequence[tuple[str, float | torch.Tensor | None]], num_kv_heads: int
) -> float | torch.Tensor:
    """Multiply named scales: a float, or float32 [num_kv_heads] if one of them is a tensor."""
    product = 1.0
    tensor: torch.Tensor | None = None
    for name, scale in scales:
        if isinstance(scale, torch.Tensor):
            if scale.numel() not in (1, num_kv_heads):
                raise ValueError(
                    f"{name} must have 1 element or one per kv head ({num_kv_heads}); "
                    f"got shape {list(scale.shape)}"
                )
            factor = scale.to(torch.float32).reshape(-1)
            tensor = factor if tensor is None else tensor * factor
        elif scale is not None:
            product *= float(scale)
    if tensor is None:
        return product
    if product != 1.0:
        tensor = tensor * product
    return tensor.expand(num_kv_heads).contiguous()
