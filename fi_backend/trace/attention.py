"""Attention over paged and ragged keys, and merging of its states."""

from __future__ import annotations

import math

import torch

from fi_backend.trace.template import Scalar, Tensor, TraceTemplate

__all__ = ["TEMPLATES"]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sm_scale: float | None,
    causal: bool,
    window_left: int,
    logits_soft_cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from the last rows of one request; return (out, lse base 2) in float32."""
    qo_len, kv_len, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    if sm_scale is None:
        sm_scale = 1.0 / math.sqrt(q.shape[2])
    k = k.float().repeat_interleave(group, 1)
    v = v.float().repeat_interleave(group, 1)
    logits = torch.einsum("qhd,khd->qhk", q.float(), k) * sm_scale
    if logits_soft_cap is not None and logits_soft_cap > 0:
        logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
    row = torch.arange(qo_len, device=q.device)[:, None] + kv_len - qo_len
    key = torch.arange(kv_len, device=q.device)[None, :]
    hidden = torch.zeros(qo_len, kv_len, dtype=torch.bool, device=q.device)
    if causal:
        hidden = hidden | (key > row)
    if window_left >= 0:
        hidden = hidden | (key < row - window_left)
    logits = logits.masked_fill(hidden[:, None, :], -math.inf)
    lse = torch.logsumexp(logits, -1)
    # A row that sees no key has lse = -inf: its weights are NaN, and its result is 0.
    weights = torch.exp(logits - lse[..., None]).nan_to_num(0.0)
    return torch.einsum("qhk,khd->qhd", weights, v), lse / math.log(2)


def read_pages(cache: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """Gather pages as one row of tokens; as bytes, since indexing does not know fp8."""
    return cache.view(torch.uint8)[pages.long()].view(cache.dtype).flatten(0, 1)


def paged_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from the newest token of each request to its pages."""
    out = torch.zeros(*q.shape[:2], v_cache.shape[-1], dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float32, device=q.device)
    for r in range(q.shape[0]):
        pages = kv_indices[int(kv_indptr[r]) : int(kv_indptr[r + 1])]
        kv_len = max(len(pages) - 1, 0) * k_cache.shape[1] + int(kv_last_page_len[r])
        k, v = (read_pages(cache, pages)[:kv_len] for cache in (k_cache, v_cache))
        out[r : r + 1], lse[r : r + 1] = attend(
            q[r : r + 1], k, v, sm_scale, False, window_left, logits_soft_cap
        )
    return out.to(q.dtype), lse


def paged_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_lens: torch.Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from the new tokens of each request to its pages."""
    out = torch.zeros(*q.shape[:2], v_cache.shape[-1], dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float32, device=q.device)
    for r in range(len(qo_indptr) - 1):
        rows = slice(int(qo_indptr[r]), int(qo_indptr[r + 1]))
        pages = kv_indices[int(kv_indptr[r]) : int(kv_indptr[r + 1])]
        k, v = (read_pages(cache, pages)[: int(kv_lens[r])] for cache in (k_cache, v_cache))
        out[rows], lse[rows] = attend(q[rows], k, v, sm_scale, causal, window_left, logits_soft_cap)
    return out.to(q.dtype), lse


def ragged_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from the new tokens of each request to its keys, which lie one after the other."""
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float32, device=q.device)
    for r in range(len(qo_indptr) - 1):
        rows = slice(int(qo_indptr[r]), int(qo_indptr[r + 1]))
        keys = slice(int(kv_indptr[r]), int(kv_indptr[r + 1]))
        out[rows], lse[rows] = attend(
            q[rows], k[keys], v[keys], sm_scale, causal, window_left, logits_soft_cap
        )
    return out.to(q.dtype), lse


def single_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from one new token to the keys of its request."""
    out, lse = attend(q[None], k, v, sm_scale, False, window_left, logits_soft_cap)
    return out[0].to(q.dtype), lse[0]


def single_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from the new tokens of one request to its keys."""
    out, lse = attend(q, k, v, sm_scale, causal, window_left, logits_soft_cap)
    return out.to(q.dtype), lse


def merge(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge states v [num_rows, num_states, num_heads, head_dim] along num_states."""
    total = torch.logsumexp(s * math.log(2), 1)
    weights = torch.exp(s * math.log(2) - total[:, None]).nan_to_num(0.0)
    # An empty state has weight 0, whatever its values are.
    values = torch.where(weights[..., None] > 0, v.float(), 0.0)
    return (weights[..., None] * values).sum(1).to(v.dtype), total / math.log(2)


def merge_pair(
    v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two attention states, as if one attention had seen the keys of both."""
    return merge(torch.stack((v_a, v_b), 1), torch.stack((s_a, s_b), 1))


def merge_pair_in_place(
    v: torch.Tensor,
    s: torch.Tensor,
    v_other: torch.Tensor,
    s_other: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge another attention state into (v, s), in the rows that mask names."""
    merged_v, merged_s = merge_pair(v, s, v_other, s_other)
    if mask is None:
        return merged_v, merged_s
    rows = mask.bool()
    return (
        torch.where(rows[:, None, None], merged_v, v),
        torch.where(rows[:, None], merged_s, s),
    )


_HEADS = ("num_qo_heads", "num_kv_heads", "head_dim", "head_dim_vo")
_Q = Tensor(("num_tokens", "num_qo_heads", "head_dim"), "q")
_CACHE = Tensor(("num_pages", "page_size", "num_kv_heads", "head_dim"), "k_cache")
_V_CACHE = Tensor(("num_pages", "page_size", "num_kv_heads", "head_dim_vo"), "k_cache")
_KEYS = Tensor(("num_keys", "num_kv_heads", "head_dim"), "k")
_VALUES = Tensor(("num_keys", "num_kv_heads", "head_dim_vo"), "k")
_INDPTR = Tensor(("num_indptr",), "int32")
_INDICES = Tensor(("num_page_indices",), "int32")
_LENS = Tensor(("num_requests",), "int32")
_OPTIONS = {
    "sm_scale": Scalar("float32"),
    "window_left": Scalar("int32"),
    "logits_soft_cap": Scalar("float32"),
}
_CAUSAL = {"causal": Scalar("bool"), **_OPTIONS}
_OUTPUTS = {
    "out": Tensor(("num_tokens", "num_qo_heads", "head_dim_vo"), "q"),
    "lse": Tensor(("num_tokens", "num_qo_heads"), "float32"),
}
_EXCLUDES: dict[str, tuple[object, ...]] = {
    "kv_layout": ("NHD",),
    "pos_encoding_mode": ("NONE",),
    "q_scale": (1.0,),
    "k_scale": (1.0,),
    "v_scale": (1.0,),
    "q_len_per_req": (1,),
    "args": ((),),
    "o_data_type": (),
    "sinks": (),
    "custom_mask": (),
    "packed_custom_mask": (),
    "jit_args": (),
}
_STATE = Tensor(("num_rows", "num_heads", "head_dim"), "v_a")
_SUM = Tensor(("num_rows", "num_heads"), "float32")
_OTHER = Tensor(("num_rows", "num_heads", "head_dim"), "v")

TEMPLATES = (
    TraceTemplate(
        op_type="gqa_paged_decode",
        calls=("BatchDecodeWithPagedKVCacheWrapper.run",),
        const_axes=(*_HEADS, "page_size"),
        inputs={
            "q": Tensor(("num_requests", "num_qo_heads", "head_dim"), "q"),
            "k_cache": _CACHE,
            "v_cache": _V_CACHE,
            "kv_indptr": _INDPTR,
            "kv_indices": _INDICES,
            "kv_last_page_len": _LENS,
            **_OPTIONS,
        },
        outputs={
            "out": Tensor(("num_requests", "num_qo_heads", "head_dim_vo"), "q"),
            "lse": Tensor(("num_requests", "num_qo_heads"), "float32"),
        },
        reference=paged_decode,
        helpers=(attend, read_pages),
        renames={
            "indptr": "kv_indptr",
            "indices": "kv_indices",
            "last_page_len": "kv_last_page_len",
        },
        caches=("paged_kv_cache",),
        excludes=_EXCLUDES,
    ),
    TraceTemplate(
        op_type="gqa_paged_prefill",
        calls=("BatchPrefillWithPagedKVCacheWrapper.run", "BatchAttention.run"),
        const_axes=(*_HEADS, "page_size"),
        inputs={
            "q": _Q,
            "k_cache": _CACHE,
            "v_cache": _V_CACHE,
            "qo_indptr": _INDPTR,
            "kv_indptr": _INDPTR,
            "kv_indices": _INDICES,
            "kv_lens": _LENS,
            **_CAUSAL,
        },
        outputs=_OUTPUTS,
        reference=paged_prefill,
        helpers=(attend, read_pages),
        renames={
            "paged_kv_indptr": "kv_indptr",
            "paged_kv_indices": "kv_indices",
            "paged_kv_last_page_len": "kv_lens",  # of the same shape and dtype
            "kv_len_arr": "kv_lens",
        },
        caches=("paged_kv_cache", "kv_cache"),
        excludes=_EXCLUDES,
    ),
    TraceTemplate(
        op_type="gqa_ragged_prefill",
        calls=("BatchPrefillWithRaggedKVCacheWrapper.run",),
        const_axes=_HEADS,
        inputs={
            "q": _Q,
            "k": _KEYS,
            "v": _VALUES,
            "qo_indptr": _INDPTR,
            "kv_indptr": _INDPTR,
            **_CAUSAL,
        },
        outputs=_OUTPUTS,
        reference=ragged_prefill,
        helpers=(attend,),
        excludes=_EXCLUDES,
    ),
    TraceTemplate(
        op_type="single_decode",
        calls=("single_decode_with_kv_cache",),
        const_axes=_HEADS,
        inputs={
            "q": Tensor(("num_qo_heads", "head_dim"), "q"),
            "k": _KEYS,
            "v": _VALUES,
            **_OPTIONS,
        },
        outputs={
            "out": Tensor(("num_qo_heads", "head_dim_vo"), "q"),
            "lse": Tensor(("num_qo_heads",), "float32"),
        },
        reference=single_decode,
        helpers=(attend,),
        excludes=_EXCLUDES,
    ),
    TraceTemplate(
        op_type="single_prefill",
        calls=("single_prefill_with_kv_cache",),
        const_axes=_HEADS,
        inputs={"q": _Q, "k": _KEYS, "v": _VALUES, **_CAUSAL},
        outputs=_OUTPUTS,
        reference=single_prefill,
        helpers=(attend,),
        excludes={**_EXCLUDES, "o_dtype": ()},
    ),
    TraceTemplate(
        op_type="merge_state",
        calls=("merge_state",),
        const_axes=("num_heads", "head_dim"),
        inputs={"v_a": _STATE, "s_a": _SUM, "v_b": _STATE, "s_b": _SUM},
        outputs={"v": _STATE, "s": _SUM},
        reference=merge_pair,
        helpers=(merge,),
    ),
    TraceTemplate(
        op_type="merge_state_in_place",
        calls=("merge_state_in_place",),
        const_axes=("num_heads", "head_dim"),
        inputs={
            "v": _OTHER,
            "s": _SUM,
            "v_other": _OTHER,
            "s_other": _SUM,
            "mask": Tensor(("num_rows",), "bool", optional=True),
        },
        outputs={"v": _OTHER, "s": _SUM},
        reference=merge_pair_in_place,
        helpers=(merge, merge_pair),
    ),
    TraceTemplate(
        op_type="merge_states",
        calls=("merge_states",),
        const_axes=("num_heads", "head_dim"),
        inputs={
            "v": Tensor(("num_rows", "num_states", "num_heads", "head_dim"), "v"),
            "s": Tensor(("num_rows", "num_states", "num_heads"), "float32"),
        },
        outputs={"merged_v": _OTHER, "merged_s": _SUM},
        reference=merge,
    ),
)
