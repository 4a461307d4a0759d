"""fi_backend.page: every cache layout and dtype, skipped rows, and refusals that write nothing."""

from __future__ import annotations

import pytest
import torch

import fi_backend

HEADS, QK, VO = 3, 20, 12
PAGES, PAGE_SIZE = 7, 4
FP8 = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, *FP8)


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
    return (x.float() / scale).clamp(-FP8[dtype], FP8[dtype]).to(dtype)


def make_cache(memory: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(k, v) views [PAGES, PAGE_SIZE, HEADS, dim] of 7-filled memory in some order."""

    def filled(*sizes: int) -> torch.Tensor:
        return torch.full(sizes, 7.0).to(dtype)

    if memory == "NHD":
        return filled(PAGES, PAGE_SIZE, HEADS, QK), filled(PAGES, PAGE_SIZE, HEADS, VO)
    if memory == "HND":
        k, v = filled(PAGES, HEADS, PAGE_SIZE, QK), filled(PAGES, HEADS, PAGE_SIZE, VO)
        return k.transpose(1, 2), v.transpose(1, 2)
    both = filled(PAGES, HEADS, PAGE_SIZE, QK + VO)  # a row holds K, then V
    return both[..., :QK].transpose(1, 2), both[..., QK:].transpose(1, 2)


def new_rows(count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Strided K and V rows, as slices of a projection."""
    rows = torch.randn(count, HEADS, QK + VO + 5).to(dtype)
    return rows[..., :QK], rows[..., QK + 5 :]


@pytest.mark.parametrize("memory", ["NHD", "HND", "packed"])
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
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
def test_fp8_rows_are_stored_as_they_are(dtype: torch.dtype) -> None:
    key, value = (x.to(dtype) for x in new_rows(2, torch.float32))
    k_cache, v_cache = make_cache("HND", dtype)
    fi_backend.append_to_cache(key, value, (k_cache, v_cache), torch.tensor([9, 2]), 0.5, 0.5)
    assert same(k_cache[2, 1], key[0])
    assert same(v_cache[0, 2], value[1])


def test_fewer_rows_than_slots_need_negative_slots() -> None:
    key, value = new_rows(2, torch.float32)
    cache = make_cache("NHD", torch.float32)
    fi_backend.append_to_cache(key, value, cache, torch.tensor([3, 4, -1, -1]))
    assert torch.equal(cache[0][0, 3], key[0])
    with pytest.raises(ValueError, match="entries past the 2 rows of key must be negative"):
        fi_backend.append_to_cache(key, value, cache, torch.tensor([3, 4, -1, 5]))


def test_many_tokens_on_several_threads() -> None:
    key, value = torch.randn(3000, 4, 16), torch.randn(3000, 4, 16)
    slots = torch.randperm(4096)[:3000]
    cache = torch.zeros(256, 2, 16, 4, 16)
    fi_backend.append_to_cache(key, value, (cache[:, 0], cache[:, 1]), slots)
    flat = cache.transpose(1, 2).reshape(4096, 2, 4, 16)
    assert torch.equal(flat[slots, 0], key)
    assert torch.equal(flat[slots, 1], value)


def test_offsets_past_two_to_the_31() -> None:
    """Pages 2^30 elements apart; only the touched parts of the buffer become memory."""
    buffer = torch.empty(2**31 + 2**10, dtype=torch.bfloat16)
    k_cache = buffer.as_strided((3, 2, 1, 8), (2**30, 8, 8, 1))
    v_cache = buffer.as_strided((3, 2, 1, 8), (2**30, 8, 8, 1), 512)
    key, value = torch.randn(1, 1, 8).bfloat16(), torch.randn(1, 1, 8).bfloat16()
    fi_backend.append_to_cache(key, value, (k_cache, v_cache), torch.tensor([5]))
    assert torch.equal(k_cache[2, 1], key[0])
    assert torch.equal(v_cache[2, 1], value[0])


def paged_case() -> tuple[torch.Tensor, ...]:
    """Three requests of lengths 6, 0 and 3, of which 2, 0 and 3 tokens are new; a padding row."""
    kv_indptr = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    kv_indices = torch.tensor([4, 1, 6, 2**31 - 1], dtype=torch.int32)
    last_page_len = torch.tensor([2, 0, 3], dtype=torch.int32)
    seq_lens = fi_backend.get_seq_lens(kv_indptr, last_page_len, PAGE_SIZE)
    append_indptr = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    batch_indices, positions = fi_backend.get_batch_indices_positions(append_indptr, seq_lens, 6)
    return batch_indices, positions, kv_indices, kv_indptr, last_page_len


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


def test_seq_lens() -> None:
    lens = fi_backend.get_seq_lens(torch.tensor([0, 3, 3, 4]), torch.tensor([5, 0, 16]), 16)
    assert lens.tolist() == [37, 0, 16]


@pytest.mark.parametrize("form", ["NHD", "HND", "NHD pair", "HND pair"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
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


KEY, VALUE = torch.zeros(2, HEADS, QK), torch.zeros(2, HEADS, VO)
SLOTS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, r"key must be a torch.Tensor; got list", {"key": [1]}),
        (TypeError, "key: dtype must be float32.*got int32", {"key": KEY.int()}),
        (TypeError, "value: dtype must be float32, got bfloat16", {"value": VALUE.bfloat16()}),
        (TypeError, "slot_mapping: dtype must be int32 or int64", {"slot_mapping": SLOTS.float()}),
        (ValueError, r"value: shape must be \[2, 3, \*\]", {"value": VALUE[:, :2]}),
        (ValueError, r"key_cache: shape must be \[\*, \*, 3, 16\]", {"key": KEY[..., :16]}),
        (
            ValueError,
            r"slot_mapping: must be below 7 pages \* 4 tokens.*slot_mapping\[1\] = 28",
            {"slot_mapping": torch.tensor([0, 28])},
        ),
        (ValueError, "slot_mapping", {"slot_mapping": torch.tensor([1, 2**40])}),
        (ValueError, "key: the last dimension must be contiguous", {
            "key": torch.zeros(2, HEADS, 2 * QK)[..., ::2],
        }),
    ],
)  # fmt: skip
def test_bad_appends_write_nothing(
    error: type[Exception], message: str, changed: dict[str, object]
) -> None:
    cache = make_cache("NHD", torch.float32)
    arguments = {"key": KEY, "value": VALUE, "kv_cache": cache, "slot_mapping": SLOTS, **changed}
    with pytest.raises(error, match=message):
        fi_backend.append_to_cache(**arguments)
    assert all(bool((part == 7).all()) for part in cache)


def test_bad_scales_and_cache_dtypes() -> None:
    cache = make_cache("NHD", torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="k_scale: must be above 0, got 0"):
        fi_backend.append_to_cache(KEY, VALUE, cache, SLOTS, k_scale=0.0)
    with pytest.raises(ValueError, match=r"v_scale: shape must be \[3\], got \[2\]"):
        fi_backend.append_to_cache(KEY, VALUE, cache, SLOTS, v_scale=torch.ones(2))
    key, value = KEY.to(torch.float8_e5m2), VALUE.to(torch.float8_e5m2)
    with pytest.raises(TypeError, match="key_cache: dtype must be that of an fp8 key"):
        fi_backend.append_to_cache(key, value, cache, SLOTS)


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("got request 3 and position 0 at index 1", {"batch_indices": [0, 3]}),
        ("got request 0 and position -1 at index 0", {"positions": [-1, 0]}),
        ("got request 1 and position 4 at index 1", {"positions": [0, 4], "batch_indices": [0, 1]}),
        ("must rise .* the size of kv_indices", {"kv_indptr": [0, 2, 3, 9]}),
        ("must rise .* the size of kv_indices", {"kv_indptr": [0, 2, 1, 3]}),
        ("7 cached pages, got request 0", {"kv_indices": [7, 1, 6]}),
        (r"kv_last_page_len must have shape \[3\]", {"kv_last_page_len": [1]}),
    ],
)
def test_bad_positions_write_nothing(message: str, changed: dict[str, list[int]]) -> None:
    arguments = {
        "batch_indices": [0, 2],
        "positions": [0, 0],
        "kv_indices": [4, 1, 6],
        "kv_indptr": [0, 2, 3, 3],
        "kv_last_page_len": [2, 0, 3],
    }
    arguments["kv_indptr"] = [0, 1, 2, 3]
    arguments.update(changed)
    tensors = {name: torch.tensor(value).int() for name, value in arguments.items()}
    cache = torch.zeros(PAGES, 2, PAGE_SIZE, HEADS, QK)
    with pytest.raises(ValueError, match=message):
        fi_backend.append_paged_kv_cache(
            torch.ones(2, HEADS, QK), torch.ones(2, HEADS, QK), paged_kv_cache=cache, **tensors
        )
    assert cache.count_nonzero() == 0


def test_bad_ragged_batches() -> None:
    run = fi_backend.get_batch_indices_positions
    with pytest.raises(
        ValueError, match="append_indptr: must rise from 0 or more to at most nnz = 4"
    ):
        run(torch.tensor([0, 5]), torch.tensor([9]), 4)
    with pytest.raises(ValueError, match=r"seq_lens\[0\] = 3 for 4 appended tokens"):
        run(torch.tensor([0, 4]), torch.tensor([3]), 4)
    with pytest.raises(ValueError, match=r"positions must have shape \[nnz=4\]; got \[3\]"):
        run(torch.tensor([0, 4]), torch.tensor([4]), 4, positions=torch.zeros(3).int())
    with pytest.raises(ValueError, match="kv_layout must be one of NHD, HND; got 'XYZ'"):
        fi_backend.append_paged_kv_cache(*[KEY] * 8, kv_layout="XYZ")
