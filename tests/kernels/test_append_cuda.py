"""The append kernel on a GPU: every byte of the cache is compared."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cuda_modules import BF16, E4M3, E5M2, F16, append_spec, bits

pytestmark = pytest.mark.gpu

DTYPES = [(BF16, BF16), (F16, E4M3), (BF16, E5M2)]
# (heads, dim_qk, dim_vo, page_size): odd heads, dims no access divides, qk unlike vo, any page.
SHAPES = [
    (8, 128, 128, 16),
    (1, 64, 64, 1),
    (71, 128, 128, 17),
    (2, 100, 100, 16),
    (4, 192, 128, 64),
    (3, 96, 33, 5),
]


def rows(tokens: int, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(tokens, heads, dim, device="cuda") * 3).to(dtype)


def make_cache(pages: int, page_size: int, heads: int, dim: int, dtype: Any, layout: str) -> Any:
    """Return a [pages, page, head, dim] view of a cache in random bits, so NaN is among them."""
    shape = (pages, page_size, heads, dim) if layout == "NHD" else (pages, heads, page_size, dim)
    cache = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, device="cuda")
    cache = cache.view(dtype)[..., 0] if dtype.itemsize == 1 else cache.flatten(3).view(dtype)
    return cache if layout == "NHD" else cache.transpose(1, 2)


def stored(x: torch.Tensor, scale: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return what a cache holds for rows x: x / scale, saturated."""
    if dtype == x.dtype:
        return x
    limit = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-limit, limit).to(dtype)


def write(cache: torch.Tensor, slots: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the bits of `cache` with x[i] at slots[i] >= 0, in logical order."""
    expected = bits(cache).clone()
    page_size = cache.shape[1]
    keep = slots >= 0
    page, offset = slots[keep] // page_size, slots[keep] % page_size
    expected[page, offset] = bits(x)[keep]
    return expected


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_slots_and_positions(cuda_module: Any, dtypes: Any, shape: Any, layout: str) -> None:
    module = cuda_module(append_spec, dtypes)
    heads, dim_qk, dim_vo, page_size = shape
    dtype, cache_dtype = dtypes
    pages = 23
    lengths = [3 * page_size + 1, 0, page_size, 2 * page_size - (page_size > 1)]
    tables = torch.randperm(pages, device="cuda").int()
    pages_per_request = [-(-n // page_size) for n in lengths]
    indptr = torch.tensor([0, *torch.tensor(pages_per_request).cumsum(0).tolist()]).int().cuda()

    # The last tokens of each request, some skipped, in random order.
    batch, position = [], []
    for request, length in enumerate(lengths):
        for p in range(max(0, length - 9), length):
            batch.append(request)
            position.append(p)
    order = torch.randperm(len(batch))
    batch_indices = torch.tensor(batch)[order].int().cuda()
    positions = torch.tensor(position)[order].int().cuda()
    page = tables[(indptr[batch_indices.long()] + positions // page_size).long()].long()
    slots = page * page_size + positions % page_size
    batch_indices[::4] = -1
    slots[::4] = -1

    wide = rows(len(batch), heads + 2, dim_qk, dtype)  # rows of a fused projection
    key, value = wide[:, 1 : heads + 1], rows(len(batch), heads, dim_vo, dtype)
    k_scale = torch.rand(heads, device="cuda") + 0.5
    want_k = stored(key, k_scale[:, None], cache_dtype)
    want_v = stored(value, 0.25, cache_dtype)
    for form in ("int64", "int32", "positions"):
        k_cache = make_cache(pages, page_size, heads, dim_qk, cache_dtype, layout)
        v_cache = make_cache(pages, page_size, heads, dim_vo, cache_dtype, layout)
        expected = write(k_cache, slots, want_k), write(v_cache, slots, want_v)
        tensors = (key, value, k_cache, v_cache)
        scales = (k_scale, None, 7.0, 0.25, False)  # the tensor has precedence over the number
        if form == "positions":
            module.append_positions(*tensors, batch_indices, positions, tables, indptr, *scales)
        else:
            module.append_slots(*tensors, slots.to(getattr(torch, form)), *scales)
        assert torch.equal(bits(k_cache), expected[0])
        assert torch.equal(bits(v_cache), expected[1])


def test_fp8_saturates_and_keeps_nan(cuda_module: Any) -> None:
    module = cuda_module(append_spec, (F16, E4M3))
    special = [math.nan, math.inf, -math.inf, 65504.0, -65504.0, 448.0, 2.0**-10, 0.0]
    key = torch.tensor(special, dtype=F16, device="cuda").repeat(1, 1, 8)
    cache = torch.zeros(1, 1, 1, 64, dtype=E4M3, device="cuda")
    slots = torch.zeros(1, dtype=torch.int64, device="cuda")
    for scale in (torch.full((1,), 0.5, device="cuda"), None):
        cache.zero_()
        module.append_slots(key, key, cache, cache.clone(), slots, scale, scale, 0.5, 0.5, False)
        got = cache.flatten()[:8].float().tolist()
        assert math.isnan(got[0])
        assert got[1:] == [448.0, -448.0, 448.0, -448.0, 448.0, 2.0**-9, 0.0]


def test_nothing_outside_is_written(cuda_module: Any) -> None:
    """Slots and page ids past the cache, and positions past a request's pages, are skipped."""
    module = cuda_module(append_spec, (BF16, BF16))
    key = rows(6, 2, 64, BF16)
    around = make_cache(12, 4, 2, 64, BF16, "NHD")
    cache, value_cache = around[4:8], make_cache(4, 4, 2, 64, BF16, "NHD")
    before, value_before = bits(around).clone(), bits(value_cache).clone()
    scales = (None, None, 1.0, 1.0, False)
    slots = torch.tensor([16, -1, 17, 2**31 + 5, -(2**40), 2**62], device="cuda")
    module.append_slots(key, key, cache, value_cache, slots, *scales)
    assert torch.equal(bits(around), before)
    requests = torch.tensor([0, 0, 1, 2, -7, 1], device="cuda").int()
    positions = torch.tensor([4, 2**31 - 1, 0, 0, 0, -1], device="cuda").int()
    indices = torch.tensor([3, 2147480000, 1], device="cuda").int()
    indptr = torch.tensor([0, 1, 2], device="cuda").int()  # request 1's page id is out of range
    module.append_positions(
        key, key, cache, value_cache, requests, positions, indices, indptr, *scales
    )
    module.append_slots(key, key, cache, value_cache, slots[:0], *scales)
    module.append_slots(key[:0], key[:0], cache, value_cache, slots.clamp(0, 3), *scales)
    assert torch.equal(bits(around), before)
    assert torch.equal(bits(value_cache), value_before)


def test_page_ids_are_read_only_where_there_are_some(cuda_module: Any) -> None:
    """Whatever kv_indptr says, ids before and after the vector, valid ones here, are not used."""
    module = cuda_module(append_spec, (BF16, BF16))
    key, cache = rows(4, 2, 64, BF16), make_cache(4, 4, 2, 64, BF16, "NHD")
    before = bits(cache).clone()
    indices = torch.ones(30, device="cuda").int()[10:12]
    indptr = torch.tensor([-9, -8, 0, 2, 9], device="cuda").int()
    requests = torch.tensor([0, 3, 3, 3], device="cuda").int()
    positions = torch.tensor([0, 0, 4, 27], device="cuda").int()
    scales = (None, None, 1.0, 1.0, False)
    module.append_positions(key, key, cache, cache, requests, positions, indices, indptr, *scales)
    assert torch.equal(bits(cache), before)
    requests = torch.tensor([-1, -1, -1, 2], device="cuda").int()
    positions.fill_(7)
    module.append_positions(key, key, cache, cache, requests, positions, indices, indptr, *scales)
    assert torch.equal(bits(cache)[1, 3], bits(key)[3])


def test_large_offsets_and_slots(cuda_module: Any) -> None:
    module = cuda_module(append_spec, (BF16, BF16))
    key = rows(3, 2, 128, BF16)
    scales = (None, None, 1.0, 1.0, False)
    # Pages more than 2^31 elements apart.
    page_stride = 2**31 + 64
    storage = torch.zeros(page_stride + 16 * 256, dtype=BF16, device="cuda")
    cache = storage.as_strided((2, 16, 2, 128), (page_stride, 256, 128, 1))
    other = make_cache(2, 16, 2, 128, BF16, "NHD")
    slots = torch.tensor([31, -1, 0], device="cuda")
    module.append_slots(key, key, cache, other, slots, *scales)
    assert torch.equal(cache[1, 15], key[0])
    assert torch.equal(cache[0, 0], key[2])
    # Slots on both sides of 2^31 and past 2^32: pages overlap, so that this takes little memory.
    many = storage.as_strided((5000, 2**20, 2, 128), (256, 8, 128, 1))
    for numbers in ([4999 * 2**20 + 3, 7, -1], [2**31 - 2**19, 2**31 + 5, 2**32 - 2**18]):
        module.append_slots(key, key, many, many, torch.tensor(numbers, device="cuda"), *scales)
        for i, slot in enumerate(numbers):
            if slot >= 0:
                assert torch.equal(many[slot // 2**20, slot % 2**20], key[i])


def test_errors_name_the_argument(cuda_module: Any) -> None:
    module = cuda_module(append_spec, (BF16, BF16))
    key, cache = rows(4, 2, 64, BF16), make_cache(3, 4, 2, 64, BF16, "NHD")
    slots = torch.zeros(4, dtype=torch.int64, device="cuda")
    scales = (None, None, 1.0, 1.0, False)
    with pytest.raises(ValueError, match=r"value_cache: shape must be \[3, 4, 2, 64\]"):
        module.append_slots(key, key, cache, cache[:2], slots, *scales)
    with pytest.raises(TypeError, match="slot_mapping: dtype must be int32 or int64, got float32"):
        module.append_slots(key, key, cache, cache, slots.float(), *scales)
    table = torch.zeros(4, dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="key: must have a row for each of the 4 tokens, got 3"):
        module.append_positions(key[:3], key[:3], cache, cache, *[table] * 4, *scales)
    with pytest.raises(ValueError, match="slot_mapping: must be on device cuda:0, got cpu"):
        module.append_slots(key, key, cache, cache, slots.cpu(), *scales)
    bad = torch.ones(3, device="cuda")
    with pytest.raises(ValueError, match=r"k_scale: shape must be \[2\], got \[3\]"):
        module.append_slots(key, key, cache, cache, slots, bad, None, 1.0, 1.0, False)
