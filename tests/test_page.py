"""fi_backend.page: every cache layout and dtype, skipped rows, graphs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from page_cases import (
    CACHE_DTYPES,
    FLOATS,
    FP8,
    HEADS,
    PAGE_SIZE,
    PAGES,
    QK,
    make_cache,
    new_rows,
    paged_case,
)
from sync_debug import nothing_waits

import fi_backend
from fi_backend import jit
from fi_backend.kernels.append_kv import append_cuda_spec

on_cuda = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)


@pytest.fixture(scope="module", autouse=True)
def _cuda_kernels() -> None:
    """Compile what the CUDA cases load, in parallel."""
    if torch.cuda.is_available():
        dtypes = [*product(FLOATS, CACHE_DTYPES), *((fp8, fp8) for fp8 in FP8)]
        jit.build([append_cuda_spec(*pair) for pair in dtypes])


def same(value: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bit for bit, but that any NaN equals any other."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    storage = sizes[expected.dtype.itemsize]
    nan = expected.float().isnan()
    value_bits = value.contiguous().view(storage).masked_fill(nan, 0)
    expected_bits = expected.contiguous().view(storage).masked_fill(nan, 0)
    return torch.equal(value.float().isnan(), nan) and torch.equal(value_bits, expected_bits)


def stored(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | float) -> torch.Tensor:
    """What a cache of `dtype` holds for x."""
    if dtype not in FP8 or x.dtype == dtype:
        return x.to(dtype)
    scale = torch.as_tensor(scale, dtype=torch.float32)  # CUDA would multiply by 1 / a number
    return (x.float() / scale).clamp(-FP8[dtype], FP8[dtype]).to(dtype)


@pytest.mark.parametrize("memory", ["NHD", "HND", "packed"])
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.usefixtures("device")
def test_append_to_cache(dtype: torch.dtype, cache_dtype: torch.dtype, memory: str) -> None:
    slots = torch.tensor([5, -1, 0, PAGES * PAGE_SIZE - 1, -7, 13])
    key, value = new_rows(8, dtype)  # two rows more than slots
    key[0, 0, :4] = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0])
    k_cache, v_cache = make_cache(memory, cache_dtype)
    k_expected, v_expected = k_cache.clone(), v_cache.clone()
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            at = divmod(slot, PAGE_SIZE)
            k_expected[at] = stored(key[row], cache_dtype, 0.5)
            v_expected[at] = stored(value[row], cache_dtype, 0.01)
    fi_backend.append_to_cache(key, value, (k_cache, v_cache), slots.int(), 0.5, 0.01)
    assert same(k_cache, k_expected)
    assert same(v_cache, v_expected)
    fi_backend.append_to_cache(key, value, (k_cache, v_cache), slots, 0.5, 0.01)
    assert same(k_cache, k_expected)


@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.usefixtures("device")
def test_fp8_scales_may_be_tensors(dtype: torch.dtype) -> None:
    key, value = new_rows(2, torch.float32)
    key[0, 1, 3] = 1e6  # saturates
    k_scale, v_scale = torch.tensor([0.5, 3.0, 0.1]), torch.tensor(0.25)
    k_cache, v_cache = make_cache("NHD", dtype)
    fi_backend.append_to_cache(
        key, value, (k_cache, v_cache), torch.tensor([0, 1]), k_scale, v_scale
    )
    assert same(k_cache[0, :2], stored(key, dtype, k_scale[:, None]))
    assert same(v_cache[0, :2], stored(value, dtype, 0.25))
    assert k_cache[0, 0, 1, 3].float() == FP8[dtype]


@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.usefixtures("device")
def test_fp8_rows_are_stored_as_they_are(dtype: torch.dtype) -> None:
    key, value = (x.to(dtype) for x in new_rows(2, torch.float32))
    k_cache, v_cache = make_cache("HND", dtype)
    fi_backend.append_to_cache(key, value, (k_cache, v_cache), torch.tensor([9, 2]), 0.5, 0.5)
    assert same(k_cache[2, 1], key[0])
    assert same(v_cache[0, 2], value[1])


@pytest.mark.usefixtures("device")
def test_many_tokens_on_several_threads() -> None:
    key, value = torch.randn(3000, 4, 16), torch.randn(3000, 4, 16)
    slots = torch.randperm(4096)[:3000]
    cache = torch.zeros(256, 2, 16, 4, 16)
    fi_backend.append_to_cache(key, value, (cache[:, 0], cache[:, 1]), slots)
    flat = cache.transpose(1, 2).reshape(4096, 2, 4, 16)
    assert torch.equal(flat[slots, 0], key)
    assert torch.equal(flat[slots, 1], value)


@pytest.mark.usefixtures("device")
def test_offsets_past_two_to_the_31() -> None:
    """Pages 2^30 elements apart; only the touched parts of the buffer become memory."""
    buffer = torch.empty(2**31 + 2**10, dtype=torch.bfloat16)
    k_cache = buffer.as_strided((3, 2, 1, 8), (2**30, 8, 8, 1))
    v_cache = buffer.as_strided((3, 2, 1, 8), (2**30, 8, 8, 1), 512)
    key, value = torch.randn(1, 1, 8).bfloat16(), torch.randn(1, 1, 8).bfloat16()
    fi_backend.append_to_cache(key, value, (k_cache, v_cache), torch.tensor([5]))
    assert torch.equal(k_cache[2, 1], key[0])
    assert torch.equal(v_cache[2, 1], value[0])


@pytest.mark.usefixtures("device")
def test_batch_indices_and_positions() -> None:
    batch_indices, positions, *_ = paged_case()
    assert batch_indices.dtype == positions.dtype == torch.int32
    assert batch_indices.tolist() == [0, 0, 2, 2, 2, -1]
    assert positions.tolist() == [4, 5, 0, 1, 2, 0]
    given = torch.full((2, 4), 99, dtype=torch.int32)
    indptr, lens = torch.tensor([1, 3]), torch.tensor([10])
    outs = fi_backend.get_batch_indices_positions(indptr, lens, 4, given[0], given[1])
    assert outs[0].data_ptr() == given.data_ptr()
    assert given.tolist() == [[-1, 0, 0, -1], [0, 8, 9, 0]]


@pytest.mark.usefixtures("device")
def test_seq_lens() -> None:
    lens = fi_backend.get_seq_lens(torch.tensor([0, 3, 3, 4]), torch.tensor([5, 0, 16]), 16)
    assert lens.tolist() == [37, 0, 16]


@pytest.mark.parametrize("form", ["NHD", "HND", "NHD pair", "HND pair"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.usefixtures("device")
def test_append_paged_kv_cache(form: str, dtype: torch.dtype) -> None:
    layout = form[:3]
    inner = (PAGE_SIZE, HEADS) if layout == "NHD" else (HEADS, PAGE_SIZE)
    cache = torch.full((PAGES, 2, *inner, QK), 7.0).to(dtype)
    expected = cache.clone()
    key, value = torch.randn(6, HEADS, QK).to(dtype), torch.randn(6, HEADS, QK).to(dtype)
    places = [(1, 0), (1, 1), (6, 0), (6, 1), (6, 2)]  # page and offset of rows 0 to 4
    for row, (page, offset) in enumerate(places):
        for which, rows in enumerate((key, value)):
            target = expected[page, which]
            (target if layout == "NHD" else target.transpose(0, 1))[offset] = rows[row]
    batch_indices, positions, *table = paged_case()
    given = (cache[:, 0], cache[:, 1]) if form.endswith("pair") else cache
    arguments = (key, value, batch_indices, positions, given, *table)
    assert fi_backend.append_paged_kv_cache(*arguments, kv_layout=layout) is None
    assert same(cache, expected)


@pytest.mark.usefixtures("device")
def test_append_paged_mla_kv_cache() -> None:
    ckv, kpe = torch.randn(6, 32).bfloat16(), torch.randn(6, 8).bfloat16()
    ckv_cache = torch.zeros(PAGES, PAGE_SIZE, 32).bfloat16()
    kpe_cache = torch.zeros(PAGES, PAGE_SIZE, 8).bfloat16()
    batch_indices, positions, *table = paged_case()
    fi_backend.append_paged_mla_kv_cache(
        ckv, kpe, batch_indices.long(), positions.long(), ckv_cache, kpe_cache, *table
    )
    for cache, rows in ((ckv_cache, ckv), (kpe_cache, kpe)):
        assert torch.equal(cache[1, :2], rows[:2])
        assert torch.equal(cache[6, :3], rows[2:5])
        assert cache.count_nonzero() == rows[:5].count_nonzero()


Call = Callable[[], object]


def appends(tokens: int) -> tuple[Call, Call, list[torch.Tensor], list[torch.Tensor]]:
    """Both forms on int32 indices: (by slots, by positions, inputs that may change, caches)."""
    key, value = torch.randn(tokens, 2, 64).bfloat16(), torch.randn(tokens, 2, 64).bfloat16()
    slots = torch.randperm(64)[:tokens].int()
    append_indptr, kv_indptr = torch.tensor([0, 3, tokens]).int(), torch.tensor([0, 2, 4]).int()
    kv_indices, last_page_len = torch.randperm(4).int(), torch.tensor([7, 16]).int()
    caches = [torch.zeros(4, 2, 16, 2, 64).bfloat16() for _ in range(2)]
    scale = torch.full((1,), 0.5)
    batch_indices, positions = torch.empty(2, tokens).int().unbind()

    def by_slots() -> None:
        pair = (caches[0][:, 0], caches[0][:, 1])
        fi_backend.append_to_cache(key, value, pair, slots, scale, 2.0)

    def by_positions() -> None:
        lens = fi_backend.get_seq_lens(kv_indptr, last_page_len, 16)
        fi_backend.get_batch_indices_positions(
            append_indptr, lens, tokens, batch_indices, positions
        )
        table = (kv_indices, kv_indptr, last_page_len)
        fi_backend.append_paged_kv_cache(key, value, batch_indices, positions, caches[1], *table)

    return by_slots, by_positions, [key, slots, append_indptr, kv_indices, last_page_len], caches


@pytest.mark.usefixtures("device")
def test_compiled_code_is_one_graph() -> None:
    by_slots, by_positions, _, caches = appends(9)
    for call, cache in zip((by_slots, by_positions), caches, strict=True):
        call()
        expected = cache.clone()
        cache.zero_()
        torch.compile(call, fullgraph=True, backend="aot_eager")()
        assert torch.equal(cache, expected)
        assert cache.count_nonzero() > 0


@on_cuda
def test_graphs_replay_with_other_values(device: str) -> None:
    """Captured without a host read; a replay sees new rows, slots, lengths and page tables."""
    by_slots, by_positions, inputs, caches = appends(9)
    by_slots()
    by_positions()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        by_slots()
        by_positions()
    inputs[0].copy_(torch.randn(9, 2, 64))
    inputs[1].copy_(torch.randperm(64)[:9] - 3)
    inputs[2].copy_(torch.tensor([1, 2, 6]))
    inputs[3].copy_(torch.tensor([3, 2, 1, 0]))
    inputs[4].copy_(torch.tensor([16, 5]))
    for cache in caches:
        cache.zero_()
    by_slots()
    by_positions()
    expected = [cache.clone() for cache in caches]
    for cache in caches:
        assert cache.count_nonzero() > 0
        cache.zero_()
    graph.replay()
    for cache, want in zip(caches, expected, strict=True):
        assert torch.equal(cache, want)


@on_cuda
def test_nothing_waits_for_the_device_or_allocates(device: str) -> None:
    by_slots, by_positions, *_ = appends(9)
    by_slots()
    by_positions()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    by_slots()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    with nothing_waits():
        by_slots()
        by_positions()
