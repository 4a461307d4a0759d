"""Attention of a batch through the wrappers, and merging of its states."""

from __future__ import annotations

from types import ModuleType

import torch

from benchmarks.routines.routine import Bound, Inputs, Options, Routine, num_bytes, to_dtype

__all__ = ["ROUTINES"]

_WORKSPACE_BYTES = 128 << 20  # FlashInfer's; ours needs less and says how much
_SHAPE = ("batch_size", "s_kv", "num_qo_heads", "num_kv_heads", "head_dim_qk", "head_dim_vo")
_CACHE = ("page_size", "q_dtype", "kv_dtype", "random_actual_seq_len")


def _lengths(longest: int, options: Options) -> torch.Tensor:
    """Lengths of the requests, on the host."""
    if options.random_actual_seq_len:
        return torch.randint(1, longest + 1, (options.batch_size,), device="cpu").int()
    return torch.full((options.batch_size,), longest, dtype=torch.int32, device="cpu")


def _offsets(lengths: torch.Tensor) -> torch.Tensor:
    """Where each request begins, on the default device."""
    zero = torch.zeros(1, dtype=torch.int32, device="cpu")
    offsets = torch.cat([zero, lengths.cumsum(0).int()])
    return offsets.to(torch.get_default_device())


def _rows(num_tokens: int, num_heads: int, head_dim: int, dtype: str) -> torch.Tensor:
    return torch.randn(num_tokens, num_heads, head_dim).to(to_dtype(dtype))


def _cache(options: Options, kv_lens: torch.Tensor) -> Inputs:
    """Draw a cache whose pages are in random order, and its table."""
    counts = (kv_lens + options.page_size - 1) // options.page_size
    num_pages = int(counts.sum())
    k_cache, v_cache = (
        torch.randn(num_pages, options.page_size, options.num_kv_heads, head_dim).to(
            to_dtype(options.kv_dtype)
        )
        for head_dim in (options.head_dim_qk, options.head_dim_vo)
    )
    last_page_len = kv_lens - (counts - 1) * options.page_size
    return {
        "k_cache": k_cache,
        "v_cache": v_cache,
        "kv_indptr": _offsets(counts),
        "kv_indices": torch.randperm(num_pages, dtype=torch.int32),
        "kv_last_page_len": last_page_len.to(k_cache.device),
    }


def _make_decode(options: Options) -> Inputs:
    q = _rows(options.batch_size, options.num_qo_heads, options.head_dim_qk, options.q_dtype)
    return {"q": q, **_cache(options, _lengths(options.s_kv, options))}


def _bind_decode(library: ModuleType, x: Inputs, backend: str) -> Bound:
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8),
        use_tensor_cores=backend.endswith("_tc"),
        backend=backend.removesuffix("_tc"),
    )
    wrapper.plan(
        x["kv_indptr"],
        x["kv_indices"],
        x["kv_last_page_len"],
        x["q"].shape[1],
        x["k_cache"].shape[2],
        x["q"].shape[2],
        x["k_cache"].shape[1],
        q_data_type=x["q"].dtype,
        kv_data_type=x["k_cache"].dtype,
    )
    return Bound(lambda q, k, v: (wrapper.run(q, (k, v)),), (x["q"], x["k_cache"], x["v_cache"]))


def _make_paged(options: Options, qo_lens: torch.Tensor) -> Inputs:
    kv_lens = _lengths(options.s_kv, options).maximum(qo_lens)
    num_tokens = int(qo_lens.sum())
    table = _cache(options, kv_lens)
    del table["kv_last_page_len"]
    return {
        "q": _rows(num_tokens, options.num_qo_heads, options.head_dim_qk, options.q_dtype),
        **table,
        "qo_indptr": _offsets(qo_lens),
        "kv_lens": kv_lens.to(torch.get_default_device()),
        "causal": options.causal,
    }


def _make_prefill(options: Options) -> Inputs:
    return _make_paged(options, _lengths(options.s_qo, options))


def _make_mixed(options: Options) -> Inputs:
    """Every second request decodes: it has one new token."""
    qo_lens = _lengths(options.s_qo, options)
    qo_lens[::2] = 1
    return _make_paged(options, qo_lens)


def _bind_prefill(library: ModuleType, x: Inputs, backend: str) -> Bound:
    page_size = x["k_cache"].shape[1]
    wrapper = library.BatchPrefillWithPagedKVCacheWrapper(
        torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8), backend=backend
    )
    wrapper.plan(
        x["qo_indptr"],
        x["kv_indptr"],
        x["kv_indices"],
        (x["kv_lens"] - 1) % page_size + 1,
        x["q"].shape[1],
        x["k_cache"].shape[2],
        x["q"].shape[2],
        page_size,
        head_dim_vo=x["v_cache"].shape[3],
        causal=x["causal"],
        q_data_type=x["q"].dtype,
        kv_data_type=x["k_cache"].dtype,
    )
    return Bound(lambda q, k, v: (wrapper.run(q, (k, v)),), (x["q"], x["k_cache"], x["v_cache"]))


def _bind_batch_attention(library: ModuleType, x: Inputs, backend: str) -> Bound:
    wrapper = library.BatchAttention(device=str(x["q"].device))
    wrapper.plan(
        x["qo_indptr"],
        x["kv_indptr"],
        x["kv_indices"],
        x["kv_lens"],
        x["q"].shape[1],
        x["k_cache"].shape[2],
        x["q"].shape[2],
        x["v_cache"].shape[3],
        x["k_cache"].shape[1],
        causal=x["causal"],
        q_data_type=x["q"].dtype,
        kv_data_type=x["k_cache"].dtype,
    )
    return Bound(lambda q, k, v: wrapper.run(q, (k, v)), (x["q"], x["k_cache"], x["v_cache"]))


def _make_ragged(options: Options) -> Inputs:
    qo_lens = _lengths(options.s_qo, options)
    kv_lens = _lengths(options.s_kv, options).maximum(qo_lens)
    num_keys = int(kv_lens.sum())
    return {
        "q": _rows(int(qo_lens.sum()), options.num_qo_heads, options.head_dim_qk, options.q_dtype),
        "k": _rows(num_keys, options.num_kv_heads, options.head_dim_qk, options.kv_dtype),
        "v": _rows(num_keys, options.num_kv_heads, options.head_dim_vo, options.kv_dtype),
        "qo_indptr": _offsets(qo_lens),
        "kv_indptr": _offsets(kv_lens),
        "causal": options.causal,
    }


def _bind_ragged(library: ModuleType, x: Inputs, backend: str) -> Bound:
    wrapper = library.BatchPrefillWithRaggedKVCacheWrapper(
        torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8), backend=backend
    )
    wrapper.plan(
        x["qo_indptr"],
        x["kv_indptr"],
        x["q"].shape[1],
        x["k"].shape[1],
        x["q"].shape[2],
        head_dim_vo=x["v"].shape[2],
        causal=x["causal"],
        q_data_type=x["q"].dtype,
        kv_data_type=x["k"].dtype,
    )
    return Bound(lambda q, k, v: (wrapper.run(q, k, v),), (x["q"], x["k"], x["v"]))


def _work(options: Options, x: Inputs) -> tuple[int, int]:
    """Bytes of q, out and the keys and values in use; products that the mask leaves, two each."""
    qo_lens = x["qo_indptr"].diff().long() if "qo_indptr" in x else torch.ones(len(x["q"])).long()
    if "kv_last_page_len" in x:
        pages = x["kv_indptr"].diff().long()
        kv_lens = (pages - 1) * options.page_size + x["kv_last_page_len"]
    else:
        kv_lens = x["kv_lens"].long() if "kv_lens" in x else x["kv_indptr"].diff().long()
    pairs = qo_lens * kv_lens
    if x.get("causal"):
        pairs = pairs - qo_lens * (qo_lens - 1) // 2
    dims = options.head_dim_qk + options.head_dim_vo
    kv_row = options.num_kv_heads * dims * to_dtype(options.kv_dtype).itemsize
    q_row = options.num_qo_heads * dims * to_dtype(options.q_dtype).itemsize
    moved = int(kv_lens.sum()) * kv_row + len(x["q"]) * q_row
    return moved, 2 * int(pairs.sum()) * options.num_qo_heads * dims


def _make_states(options: Options) -> Inputs:
    shape = (options.batch_size, options.num_states, options.num_qo_heads, options.head_dim_vo)
    v = torch.randn(shape).to(to_dtype(options.q_dtype))
    return {"v": v, "s": torch.randn(shape[:-1]) * 4}


def _make_pair(options: Options) -> Inputs:
    shape = (options.batch_size, options.num_qo_heads, options.head_dim_vo)
    v_a, v_b = (torch.randn(shape).to(to_dtype(options.q_dtype)) for _ in "ab")
    s_a, s_b = (torch.randn(shape[:-1]) * 4 for _ in "ab")
    return {"v_a": v_a, "s_a": s_a, "v_b": v_b, "s_b": s_b}


def _merge_work(options: Options, x: Inputs) -> tuple[int, int]:
    read = num_bytes(*x.values())
    return read + read // (2 if "v_a" in x else options.num_states), 0


_MERGE = ("batch_size", "num_qo_heads", "head_dim_vo", "q_dtype")

ROUTINES = (
    Routine(
        "BatchDecodeWithPagedKVCacheWrapper",
        "BatchDecodeWithPagedKVCacheWrapper.run",
        (*_SHAPE, *_CACHE),
        _make_decode,
        _bind_decode,
        _work,
    ),
    Routine(
        "BatchPrefillWithPagedKVCacheWrapper",
        "BatchPrefillWithPagedKVCacheWrapper.run",
        (*_SHAPE, *_CACHE, "s_qo", "causal"),
        _make_prefill,
        _bind_prefill,
        _work,
    ),
    Routine(
        "BatchPrefillWithRaggedKVCacheWrapper",
        "BatchPrefillWithRaggedKVCacheWrapper.run",
        (*_SHAPE, "q_dtype", "kv_dtype", "random_actual_seq_len", "s_qo", "causal"),
        _make_ragged,
        _bind_ragged,
        _work,
    ),
    Routine(
        "BatchAttention",
        "BatchAttention.run",
        (*_SHAPE, *_CACHE, "s_qo", "causal"),
        _make_mixed,
        _bind_batch_attention,
        _work,
    ),
    Routine(
        "merge_state",
        "merge_state",
        _MERGE,
        _make_pair,
        lambda library, x, backend: Bound(library.merge_state, tuple(x.values())),
        _merge_work,
    ),
    Routine(
        "merge_states",
        "merge_states",
        (*_MERGE, "num_states"),
        _make_states,
        lambda library, x, backend: Bound(library.merge_states, tuple(x.values())),
        _merge_work,
    ),
)
