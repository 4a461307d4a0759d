"""Writing new K and V rows into a paged cache."""

from __future__ import annotations

import torch

from fi_backend.jit import KernelSpec
from fi_backend.kernels.functions import Functions, cuda_spec

__all__ = [
    "append_cuda_spec",
    "append_positions",
    "append_slots",
    "append_spec",
    "batch_positions",
]

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_STORAGE = (torch.float32, torch.float16, torch.bfloat16, *_FP8)
# FlashInfer's calls have no argument for it; results do not depend on it.
_ENABLE_PDL = True


def append_spec() -> KernelSpec:
    """Describe the module for the CPU: one for all dtypes, for a row is copied or converted."""
    return KernelSpec(name="append_cpu", target="cpu", templates=("append_cpu.cc.j2",))


def append_cuda_spec(dtype: torch.dtype, cache_dtype: torch.dtype) -> KernelSpec:
    """Describe the module for CUDA that stores rows of `dtype` in a cache of `cache_dtype`.

    Raises:
        TypeError: nothing converts between the two, on any target.
    """
    for name, value in (("key", dtype), ("key_cache", cache_dtype)):
        if value not in _STORAGE:
            allowed = ", ".join(map(_dtype_name, _STORAGE))
            raise TypeError(f"{name}: dtype must be one of {allowed}, got {_dtype_name(value)}")
    if dtype in _FP8 and cache_dtype != dtype:
        raise TypeError(
            f"key_cache: dtype must be that of an fp8 key, {_dtype_name(dtype)}, "
            f"got {_dtype_name(cache_dtype)}"
        )
    return cuda_spec("append", {"in": dtype, "cache": cache_dtype})


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_append_slots = Functions("append_slots", lambda _: append_spec())
_append_positions = Functions("append_positions", lambda _: append_spec())
_batch_positions = Functions("batch_positions", lambda _: append_spec())
_append_slots_cuda = Functions("append_slots", lambda dtypes: append_cuda_spec(*dtypes))
_append_positions_cuda = Functions("append_positions", lambda dtypes: append_cuda_spec(*dtypes))


def append_slots(
    *,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: float | torch.Tensor,
    v_scale: float | torch.Tensor,
) -> None:
    """Write token i to slot ``slot_mapping[i]``, or nowhere if that is negative.

    On CUDA this is one launch on the current stream. It looks at no value of a tensor: a slot
    outside the cache, or without a row of `key`, is skipped where the CPU raises.

    Args:
        key: [num_rows, num_kv_heads, head_dim_qk], float32, float16, bfloat16 or fp8.
        value: [num_rows, num_kv_heads, head_dim_vo], the dtype of `key`.
        key_cache: [num_pages, page_size, num_kv_heads, head_dim_qk], any strides but the last.
        value_cache: [num_pages, page_size, num_kv_heads, head_dim_vo].
        slot_mapping: int32 or int64 [num_tokens]; slot = page * page_size + offset.
        k_scale: an fp8 cache stores ``saturate(key / k_scale)``; a float, or float32 [] or [1] or
            [num_kv_heads]. Other caches ignore it.
        v_scale: the same for `value`.
    """
    k_tensor, k_value = _split_scale(k_scale)
    v_tensor, v_value = _split_scale(v_scale)
    option: int
    if key.is_cuda:
        run, option = _append_slots_cuda[key.dtype, key_cache.dtype], _ENABLE_PDL
    else:
        run, option = _append_slots[None], torch.get_num_threads()
    run(
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        k_tensor,
        v_tensor,
        k_value,
        v_value,
        option,
    )


def append_positions(
    *,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    k_scale: float | torch.Tensor = 1.0,
    v_scale: float | torch.Tensor = 1.0,
) -> None:
    """Write token i to position ``positions[i]`` of request ``batch_indices[i]``.

    A negative batch index writes nothing. Index tensors are int32; tensors of rows and caches and
    the scales are as for :func:`append_slots`, and so is what CUDA does with a token that has no
    place.

    Args:
        batch_indices: [num_tokens].
        positions: [num_tokens], counted in tokens from the start of the request.
        kv_indices: [any], page ids of all requests.
        kv_indptr: [num_requests + 1], where each request's pages begin in `kv_indices`.
    """
    k_tensor, k_value = _split_scale(k_scale)
    v_tensor, v_value = _split_scale(v_scale)
    option: int
    if key.is_cuda:
        run, option = _append_positions_cuda[key.dtype, key_cache.dtype], _ENABLE_PDL
    else:
        run, option = _append_positions[None], torch.get_num_threads()
    run(
        key,
        value,
        key_cache,
        value_cache,
        batch_indices,
        positions,
        kv_indices,
        kv_indptr,
        k_tensor,
        v_tensor,
        k_value,
        v_value,
        option,
    )


def batch_positions(
    *,
    append_indptr: torch.Tensor,
    seq_lens: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Write the request and position of every appended token; -1 and 0 where there is none.

    Args:
        append_indptr: int32 or int64 [num_requests + 1], ragged rows of each request; CPU.
        seq_lens: int32 or int64 [num_requests], lengths that include the appended tokens.
        batch_indices: int32 [num_rows], written.
        positions: int32 [num_rows], written.
    """
    _batch_positions[None](append_indptr, seq_lens, batch_indices, positions)


def _split_scale(scale: float | torch.Tensor) -> tuple[torch.Tensor | None, float]:
    return (scale, 1.0) if isinstance(scale, torch.Tensor) else (None, scale)
