"""Writes to a paged cache, alone and fused with what comes before."""

from __future__ import annotations

import torch

from fi_backend.trace.rope import rotate
from fi_backend.trace.template import Scalar, Tensor, TraceTemplate

__all__ = ["TEMPLATES"]


def store(
    cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, scale: float | torch.Tensor
) -> torch.Tensor:
    """Return a cache with rows in its slots; negative slots are skipped, fp8 values scaled."""
    kept = slots >= 0
    values = rows[: len(slots)][kept].float()
    if cache.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        limit = torch.finfo(cache.dtype).max
        per_head = scale.reshape(-1, 1) if isinstance(scale, torch.Tensor) else scale
        values = (values / per_head).clamp(-limit, limit)
    # Indexing does not know fp8: bytes are what is moved.
    stored = cache.clone()
    flat = stored.view(torch.uint8).flatten(0, 1)
    flat[slots[kept].long()] = values.to(cache.dtype).view(torch.uint8)
    return flat.view(cache.dtype).view(cache.shape)


def slots_of(
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    page_size: int,
) -> torch.Tensor:
    """Turn positions of requests into slots of the cache; -1 where there is no request."""
    request = batch_indices.long().clamp(min=0)
    page = kv_indices[kv_indptr.long()[request] + positions.long() // page_size].long()
    return torch.where(batch_indices >= 0, page * page_size + positions % page_size, -1)


def append_to_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: float | torch.Tensor = 1.0,
    v_scale: float | torch.Tensor = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write K and V rows to slots of a paged cache."""
    return (
        store(k_cache, key, slot_mapping, k_scale),
        store(v_cache, value, slot_mapping, v_scale),
    )


def append_paged_kv_cache(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write K and V rows at positions of their requests."""
    slots = slots_of(batch_indices, positions, kv_indices, kv_indptr, k_cache.shape[1])
    return store(k_cache, append_key, slots, 1.0), store(v_cache, append_value, slots, 1.0)


def rotate_and_store(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pos_ids: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    is_neox: bool,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    weight_bias: float,
    k_scale: float | torch.Tensor,
    v_scale: float | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalise heads where there is a weight, rotate them, and store keys and values."""
    cosine, sine = cos_sin_cache[pos_ids.long()].chunk(2, -1)
    heads = []
    for x, weight in ((query.float(), q_weight), (key.float(), k_weight)):
        if weight is not None:
            scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            x = x * scale * (weight.float() + weight_bias)
        heads.append(rotate(x, cosine, sine, not is_neox))
    return (
        heads[0].to(query.dtype),
        store(k_cache, heads[1], slots, k_scale),
        store(v_cache, value, slots, v_scale),
    )


def rope_append_to_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    is_neox: bool = True,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_bias: float = 0.0,
    k_scale: float | torch.Tensor = 1.0,
    v_scale: float | torch.Tensor = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotate queries and keys, and write K and V to slots of a paged cache."""
    rows = (query, key, value, positions, cos_sin_cache, k_cache, v_cache, slot_mapping)
    options = (is_neox, q_weight, k_weight, eps, weight_bias, k_scale, v_scale)
    return rotate_and_store(*rows, *options)


def rope_append_paged_kv_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pos_ids: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    is_neox: bool = True,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_bias: float = 0.0,
    k_scale: float | torch.Tensor = 1.0,
    v_scale: float | torch.Tensor = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotate queries and keys, and write K and V at positions of their requests."""
    slots = slots_of(batch_indices, positions, kv_indices, kv_indptr, k_cache.shape[1])
    rows = (query, key, value, pos_ids, cos_sin_cache, k_cache, v_cache, slots)
    options = (is_neox, q_weight, k_weight, eps, weight_bias, k_scale, v_scale)
    return rotate_and_store(*rows, *options)


_HEADS = ("num_kv_heads", "head_dim", "head_dim_vo", "page_size")
_CACHE = Tensor(("num_pages", "page_size", "num_kv_heads", "head_dim"), "k_cache")
_V_CACHE = Tensor(("num_pages", "page_size", "num_kv_heads", "head_dim_vo"), "k_cache")
_CACHES = {"k_cache": _CACHE, "v_cache": _V_CACHE}
_TOKENS = Tensor(("num_tokens",), "int32")
_SLOTS = Tensor(("num_slots",), "int32")  # tokens behind them are not stored
_TABLE = {
    "kv_indices": Tensor(("num_page_indices",), "int32"),
    "kv_indptr": Tensor(("num_indptr",), "int32"),
}
_SCALES = {"k_scale": Scalar("float32"), "v_scale": Scalar("float32")}
_KEY = Tensor(("num_tokens", "num_kv_heads", "head_dim"), "key")
_VALUE = Tensor(("num_tokens", "num_kv_heads", "head_dim_vo"), "key")
_APPEND_KEY = Tensor(("num_tokens", "num_kv_heads", "head_dim"), "append_key")
_APPEND_VALUE = Tensor(("num_tokens", "num_kv_heads", "head_dim_vo"), "append_key")
_QUERY = Tensor(("num_tokens", "num_qo_heads", "head_dim"), "query")
_ROWS = {
    "query": _QUERY,
    "key": Tensor(("num_tokens", "num_kv_heads", "head_dim"), "query"),
    "value": Tensor(("num_tokens", "num_kv_heads", "head_dim_vo"), "query"),
}
_ANGLES = Tensor(("max_position", "rotary_dim"), "float32")
_WEIGHT = Tensor(("head_dim",), "query", optional=True)
_NORM_OPTIONS: dict[str, Tensor | Scalar] = {
    "is_neox": Scalar("bool"),
    "q_weight": _WEIGHT,
    "k_weight": _WEIGHT,
    "eps": Scalar("float32"),
    "weight_bias": Scalar("float32"),
    **_SCALES,
}

TEMPLATES = (
    TraceTemplate(
        op_type="append_to_cache",
        calls=("append_to_cache",),
        const_axes=_HEADS,
        inputs={"key": _KEY, "value": _VALUE, **_CACHES, "slot_mapping": _SLOTS, **_SCALES},
        outputs=_CACHES,
        reference=append_to_cache,
        helpers=(store,),
        caches=("kv_cache",),
    ),
    TraceTemplate(
        op_type="append_paged_kv_cache",
        calls=("append_paged_kv_cache",),
        const_axes=_HEADS,
        inputs={
            "append_key": _APPEND_KEY,
            "append_value": _APPEND_VALUE,
            "batch_indices": _TOKENS,
            "positions": _TOKENS,
            **_CACHES,
            **_TABLE,
            "kv_last_page_len": Tensor(("num_requests",), "int32"),
        },
        outputs=_CACHES,
        reference=append_paged_kv_cache,
        helpers=(store, slots_of),
        caches=("paged_kv_cache",),
        excludes={"kv_layout": ("NHD",)},
    ),
    TraceTemplate(
        op_type="rope_append_to_cache",
        calls=("rope_append_to_cache",),
        const_axes=("num_qo_heads", *_HEADS, "rotary_dim"),
        inputs={
            **_ROWS,
            "positions": _TOKENS,
            "cos_sin_cache": _ANGLES,
            **_CACHES,
            "slot_mapping": _SLOTS,
            **_NORM_OPTIONS,
        },
        outputs={"out": _QUERY, **_CACHES},
        reference=rope_append_to_cache,
        helpers=(rotate, store, rotate_and_store),
        caches=("kv_cache",),
    ),
    TraceTemplate(
        op_type="rope_append_paged_kv_cache",
        calls=("rope_append_paged_kv_cache",),
        const_axes=("num_qo_heads", *_HEADS, "rotary_dim"),
        inputs={
            **_ROWS,
            "pos_ids": _TOKENS,
            "cos_sin_cache": _ANGLES,
            "batch_indices": _TOKENS,
            "positions": _TOKENS,
            **_CACHES,
            **_TABLE,
            **_NORM_OPTIONS,
        },
        outputs={"out": _QUERY, **_CACHES},
        reference=rope_append_paged_kv_cache,
        helpers=(rotate, store, slots_of, rotate_and_store),
        caches=("paged_kv_cache",),
        excludes={"kv_layout": ("NHD",)},
    ),
)
