"""SGLang's pools as the paged views that our kernels read, and writing to them."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from fi_backend.errors import UnsupportedError

__all__ = ["in_window_pool", "paged_views", "window_slots", "write"]


def window_slots(pool: Any) -> torch.Tensor | None:
    """Return int64 [num_slots], the window pool's slot for each slot; None without such a pool.

    A hybrid pool keeps windowed layers in a pool of their own, from which tokens that no window
    reaches any more are freed. Its tables hold slots of the full pool.
    """
    return pool.full_to_swa_index_mapping if isinstance(pool, SWAKVPool) else None


def in_window_pool(pool: Any, layer_id: int) -> bool:
    """Whether a layer's cache is in the window pool of a hybrid pool."""
    return isinstance(pool, SWAKVPool) and bool(pool.layers_mapping[layer_id][1])


def paged_views(pool: Any, layer_id: int, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (k, v) of a layer, each [num_pages, page_size, num_kv_heads, head_dim].

    SGLang's getter is called each time, because it may have to wait for a layer that is still being
    loaded; the views are not copies.

    Raises:
        UnsupportedError: the pool keeps its tokens in another order than one after the other.
    """
    k, v = pool.get_kv_buffer(layer_id)
    if k.dim() != 3:
        raise UnsupportedError(
            f"a cache must be [slots, heads, head_dim]; layer {layer_id} has {list(k.shape)}. "
            f"Unset SGLANG_USE_HND_KVCACHE"
        )
    return _paged(k, page_size), _paged(v, page_size)


def _paged(slots: torch.Tensor, page_size: int) -> torch.Tensor:
    pages = slots.shape[0] // page_size
    return slots[: pages * page_size].view(pages, page_size, slots.shape[1], slots.shape[2])


def write(
    pool: Any,
    layer: Any,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    window_slots: torch.Tensor | None,
) -> None:
    """Write a layer's new keys and values through SGLang's pool.

    The pool quantises and may change `k` and `v` in place: nothing may read them afterwards.

    Args:
        pool: the pool.
        layer: the RadixAttention, for its number and scales.
        k: [num_tokens, num_kv_heads, head_dim_qk].
        v: [num_tokens, num_kv_heads, head_dim_vo].
        slots: int64 [num_tokens].
        window_slots: the same in the window pool; None without one.
    """
    where = KVWriteLoc(slots, window_slots)
    pool.set_kv_buffer(layer, where, k, v, layer.k_scale, layer.v_scale)
