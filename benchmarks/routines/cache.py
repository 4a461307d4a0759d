"""Rope, writes to the paged cache, and both in one step."""

from __future__ import annotations

from types import ModuleType

import torch

from benchmarks.rope import make_cache
from benchmarks.routines.routine import Bind, Bound, Inputs, Options, Routine, num_bytes, to_dtype

__all__ = ["ROUTINES"]

_HEADS = ("batch_size", "num_qo_heads", "num_kv_heads", "head_dim_qk", "q_dtype")
_CACHE = ("batch_size", "s_kv", "num_kv_heads", "head_dim_qk", "page_size", "q_dtype", "kv_dtype")


def _tokens(options: Options, num_heads: int) -> torch.Tensor:
    """Draw one row a request."""
    rows = torch.randn(options.batch_size, num_heads, options.head_dim_qk)
    return rows.to(to_dtype(options.q_dtype))


def _make_rope(options: Options) -> Inputs:
    return {
        "q": _tokens(options, options.num_qo_heads),
        "k": _tokens(options, options.num_kv_heads),
        "pos_ids": torch.randint(options.s_kv, (options.batch_size,), dtype=torch.int32),
        "interleave": options.interleave,
    }


def _make_ragged_rope(options: Options) -> Inputs:
    x = _make_rope(options)
    request = torch.arange(options.batch_size + 1, dtype=torch.int32)
    return {
        "q": x["q"],
        "k": x["k"],
        "indptr": request,
        "offsets": x["pos_ids"],
        "interleave": options.interleave,
    }


def _make_rope_by_cache(options: Options) -> Inputs:
    x = _make_rope(options)
    return {
        "positions": x["pos_ids"].long(),
        "query": x["q"].flatten(1),
        "key": x["k"].flatten(1),
        "head_size": options.head_dim_qk,
        "cos_sin_cache": make_cache(options.s_kv, options.head_dim_qk),
        "is_neox": not options.interleave,
    }


def _bind_by_name(name: str) -> Bind:
    """Bind a function whose parameters have the names of the inputs."""

    def bind(library: ModuleType, x: Inputs, backend: str) -> Bound:
        function = getattr(library, name)
        tensors = {key: value for key, value in x.items() if isinstance(value, torch.Tensor)}
        options = {key: value for key, value in x.items() if key not in tensors}

        def call(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
            named = dict(zip(tensors, arguments, strict=True))
            return function(**named, **options)

        return Bound(call, tuple(tensors.values()))

    return bind


def _rope_work(options: Options, x: Inputs) -> tuple[int, int]:
    rows = (x["query"], x["key"]) if "query" in x else (x["q"], x["k"])
    return 2 * num_bytes(*rows), 0


def _places(options: Options) -> Inputs:
    """Draw a cache of `s_kv` tokens a request, and a place for one new token in each request."""
    pages = -(-options.s_kv // options.page_size)
    shape = (options.batch_size * pages, options.page_size, options.num_kv_heads)
    dtype = to_dtype(options.kv_dtype)
    k_cache, v_cache = (torch.randn(*shape, options.head_dim_qk).to(dtype) for _ in "kv")
    indptr = torch.arange(options.batch_size + 1, dtype=torch.int32) * pages
    last = (options.s_kv - 1) % options.page_size + 1
    return {
        "batch_indices": torch.arange(options.batch_size, dtype=torch.int32),
        "positions": torch.full((options.batch_size,), options.s_kv - 1, dtype=torch.int32),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "kv_indices": torch.randperm(shape[0], dtype=torch.int32),
        "kv_indptr": indptr,
        "kv_last_page_len": torch.full((options.batch_size,), last, dtype=torch.int32),
    }


def _slots(x: Inputs) -> torch.Tensor:
    page_size = x["k_cache"].shape[1]
    first = x["kv_indptr"].long()[x["batch_indices"].long()]
    page = x["kv_indices"].long()[first + x["positions"].long() // page_size]
    return page * page_size + x["positions"] % page_size


def _make_append_paged(options: Options) -> Inputs:
    key, value = (_tokens(options, options.num_kv_heads) for _ in "kv")
    return {"append_key": key, "append_value": value, **_places(options)}


def _make_append(options: Options) -> Inputs:
    key, value = (_tokens(options, options.num_kv_heads) for _ in "kv")
    x = _places(options)
    caches = {"k_cache": x["k_cache"], "v_cache": x["v_cache"]}
    return {"key": key, "value": value, **caches, "slot_mapping": _slots(x)}


def _make_rope_append(options: Options) -> Inputs:
    angles = make_cache(options.s_kv, options.head_dim_qk)
    x = _places(options)
    return {
        "query": _tokens(options, options.num_qo_heads),
        "key": _tokens(options, options.num_kv_heads),
        "value": _tokens(options, options.num_kv_heads),
        "positions": x["positions"],
        "cos_sin_cache": angles,
        "k_cache": x["k_cache"],
        "v_cache": x["v_cache"],
        "slot_mapping": _slots(x),
        "is_neox": not options.interleave,
    }


def _make_rope_append_paged(options: Options) -> Inputs:
    rows = _make_rope_append(options)
    x = _places(options)
    del x["kv_last_page_len"]
    named = {name: rows[name] for name in ("query", "key", "value", "cos_sin_cache", "is_neox")}
    return {**named, "pos_ids": x["positions"], **x}


def _bind_append_paged(library: ModuleType, x: Inputs, backend: str) -> Bound:
    def call(*t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        key, value, batch_indices, positions, k, v, *table = t
        library.append_paged_kv_cache(key, value, batch_indices, positions, (k, v), *table)
        return k, v

    return Bound(call, tuple(x.values()))


def _bind_append(library: ModuleType, x: Inputs, backend: str) -> Bound:
    def call(*t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        key, value, k, v, slots = t
        library.append_to_cache(key, value, (k, v), slots)
        return k, v

    return Bound(call, tuple(x.values()))


def _bind_rope_append(library: ModuleType, x: Inputs, backend: str) -> Bound:
    is_neox = x["is_neox"]

    def call(*t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *rows, k, v, slots = t
        return library.rope_append_to_cache(*rows, (k, v), slots, is_neox=is_neox), k, v

    return Bound(call, tuple(value for name, value in x.items() if name != "is_neox"))


def _bind_rope_append_paged(library: ModuleType, x: Inputs, backend: str) -> Bound:
    names = ("query", "key", "value", "pos_ids", "cos_sin_cache", "batch_indices", "positions")
    table = ("k_cache", "v_cache", "kv_indices", "kv_indptr")
    is_neox = x["is_neox"]

    def call(*t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *rows, k, v, indices, indptr = t
        out = library.rope_append_paged_kv_cache(*rows, (k, v), indices, indptr, is_neox=is_neox)
        return out, k, v

    return Bound(call, tuple(x[name] for name in (*names, *table)))


def _append_work(options: Options, x: Inputs) -> tuple[int, int]:
    rows = [x[name] for name in ("append_key", "append_value", "key", "value") if name in x]
    stored = sum(row.numel() for row in rows) * to_dtype(options.kv_dtype).itemsize
    queries = 2 * num_bytes(x["query"]) if "query" in x else 0
    return num_bytes(*rows) + stored + queries, 0


_ROPE = ("s_kv", "interleave")
_FUSED = (*_CACHE, "num_qo_heads", "interleave")

ROUTINES = (
    *(
        Routine(name, name, (*_HEADS, *_ROPE), make, _bind_by_name(name), _rope_work)
        for name, make in (
            ("apply_rope", _make_ragged_rope),
            ("apply_rope_pos_ids", _make_rope),
            ("apply_llama31_rope", _make_ragged_rope),
            ("apply_llama31_rope_pos_ids", _make_rope),
            ("apply_rope_with_cos_sin_cache", _make_rope_by_cache),
        )
    ),
    *(
        Routine(name, name, used, make, bind, _append_work)
        for name, used, make, bind in (
            ("append_to_cache", _CACHE, _make_append, _bind_append),
            ("append_paged_kv_cache", _CACHE, _make_append_paged, _bind_append_paged),
            ("rope_append_to_cache", _FUSED, _make_rope_append, _bind_rope_append),
            (
                "rope_append_paged_kv_cache",
                _FUSED,
                _make_rope_append_paged,
                _bind_rope_append_paged,
            ),
        )
    ),
)
