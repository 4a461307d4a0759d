"""A row's bits with batch_invariant: the same alone, beside others and in chunks of any size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from paged_kv import paged_kv
from reference import Mask, attention, torch_attention
from tolerance import assert_accurate

import fi_backend
from fi_backend import AttentionSpec, PagedAttention, PagedBatch, Workspace

LENGTH = 451
SPEC = AttentionSpec(
    num_qo_heads=8,
    num_kv_heads=2,
    head_dim_qk=64,
    q_dtype=torch.bfloat16,
    o_dtype=torch.float32,  # a rounded output would hide most differences
    page_size=16,
    batch_invariant=True,
)
ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
# Where a request's rows are cut into steps: whole; token by token at both ends, and what a prefix
# cache leaves of a prompt; chunks that share no boundary with tiles of keys or of rows.
CHUNKS = {
    "prefix hit": (LENGTH - 1,),
    "by token": (1, 2, 3, LENGTH - 2, LENGTH - 1),
    "odd": (67, 130, 131, 259, 300),
    "even": (64, 128, 192, 256, 320, 384, 448),
}
SPECS: dict[str, dict[str, Any]] = {
    "plain": {},
    "heads of 128": {"head_dim_qk": 128},
    "heads of 256": {"head_dim_qk": 256},
    "three heads a group": {"num_qo_heads": 6},
    "pages of one token": {"page_size": 1},
    "pages of 48": {"page_size": 48},
    "window": {"window_left": 250},
    "window, pages of one token": {"window_left": 250, "page_size": 1},
    "soft cap": {"logits_soft_cap": 20.0},
    "fp8 cache": {"kv_dtype": torch.float8_e4m3fn},
    "fp8 cache, window": {"kv_dtype": torch.float8_e5m2, "window_left": 200},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
}


@dataclass(frozen=True)
class Request:
    """q [n, Hq, D], keys and values [n, Hkv, D] of a request."""

    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def make_request(spec: AttentionSpec, length: int) -> Request:
    """Draw a request whose logits spread so far that maxima move from tile to tile."""
    cache = (length, spec.num_kv_heads, spec.head_dim_qk)
    return Request(
        (4 * torch.randn(length, spec.num_qo_heads, spec.head_dim_qk)).to(spec.q_dtype),
        torch.randn(cache).to(spec.kv_dtype),
        torch.randn(cache).to(spec.kv_dtype),
    )


def attend(
    spec: AttentionSpec, device: str, requests: list[Request], rows: list[tuple[int, int]]
) -> list[torch.Tensor]:
    """Attend for rows [begin, end) of each request in one step; return each one's output."""
    left = [begin - spec.window_left if spec.window_left >= 0 else 0 for begin, _ in rows]
    cache = paged_kv(
        [request.keys[:end] for request, (_, end) in zip(requests, rows, strict=True)],
        [request.values[:end] for request, (_, end) in zip(requests, rows, strict=True)],
        spec.page_size,
        unreadable=[max(0, first) for first in left],
    )
    counts = [end - begin for begin, end in rows]
    q = torch.cat([r.q[begin:end] for r, (begin, end) in zip(requests, rows, strict=True)])
    batch = PagedBatch(
        torch.tensor([0, *counts]).cumsum(0).to(torch.int32).to(device),
        cache.kv_lens.to(device),
        block_table=cache.block_table.to(device),
        max_qo_len=max(counts),
    )
    plan = fi_backend.plan(spec, batch, Workspace(device))
    options: dict[str, torch.Tensor] = {}
    if spec.alibi:
        options["alibi_slopes"] = torch.linspace(0.01, 0.2, spec.num_qo_heads, device=device)
    if spec.sinks:
        options["sinks"] = torch.linspace(-3, 9, spec.num_qo_heads, device=device)
    kv = (cache.k_cache.to(device), cache.v_cache.to(device))
    out = PagedAttention(spec, device).run(plan, q.to(device), kv, **options)
    assert isinstance(out, torch.Tensor)
    return list(out.cpu().split(counts))


def in_chunks(
    spec: AttentionSpec, device: str, request: Request, cuts: tuple[int, ...], mates: list[Request]
) -> torch.Tensor:
    """Attend for all rows of a request, a step a chunk, with other requests before and after."""
    edges = (0, *cuts, LENGTH)
    found = []
    for step, (begin, end) in enumerate(pairwise(edges)):
        others = [
            (0, len(mate.q)) if i % 2 else (len(mate.q) - 1, len(mate.q))
            for i, mate in enumerate(mates)
        ]
        at = step % (len(mates) + 1)
        found.append(
            attend(
                spec,
                device,
                [*mates[:at], request, *mates[at:]],
                [*others[:at], (begin, end), *others[at:]],
            )[at]
        )
    return torch.cat(found)


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("name", SPECS)
def test_bits_depend_on_nothing_but_a_rows_own_past(name: str, device: str) -> None:
    spec = replace(SPEC, **SPECS[name])
    if "head_dim_qk" in SPECS[name]:
        spec = replace(spec, head_dim_vo=spec.head_dim_qk, sm_scale=spec.head_dim_qk**-0.5)
    if "kv_dtype" not in SPECS[name]:
        spec = replace(spec, kv_dtype=spec.q_dtype)
    request = make_request(spec, LENGTH)
    alone = in_chunks(spec, device, request, (), [])
    mates = [make_request(spec, length) for length in (3, 200, 64, 129)]
    for chunks, cuts in CHUNKS.items():
        for others in ([], mates):
            found = in_chunks(spec, device, request, cuts, others)
            differing = (found != alone).flatten(1).any(1).nonzero().flatten().tolist()
            assert not differing, f"{chunks}, {len(others)} mates: rows {differing[:8]} differ"


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_values(device: str) -> None:
    spec = replace(SPEC, window_left=100)
    requests = [make_request(spec, length) for length in (LENGTH, 1, 64)]
    rows = [(300, LENGTH), (0, 1), (63, 64)]
    for request, (begin, end), out in zip(
        requests, rows, attend(spec, device, requests, rows), strict=True
    ):
        tensors = (request.q[begin:end], request.keys[:end], request.values[:end])
        mask = Mask(causal=True, window_left=100)
        wanted, _ = attention(*tensors, mask, sm_scale=spec.sm_scale)
        same_dtype = torch_attention(*tensors, mask, sm_scale=spec.sm_scale)
        assert_accurate(out.to(spec.q_dtype), wanted, same_dtype, f"rows {begin} to {end}")


def test_a_fixed_split_is_refused() -> None:
    request = PagedBatch(
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([1], dtype=torch.int32),
        block_table=torch.zeros(1, 1, dtype=torch.int32),
    )
    with pytest.raises(ValueError, match="split_tokens must be 0 with a spec that is batch_inv"):
        fi_backend.plan(SPEC, request, Workspace(), split_tokens=64)
