"""What fi_backend.page refuses, and what CUDA skips because it looks at no value."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from page_cases import HEADS, PAGE_SIZE, PAGES, QK, VO, make_cache, new_rows, paged_case

import fi_backend

KEY, VALUE = torch.zeros(2, HEADS, QK), torch.zeros(2, HEADS, VO)
SLOTS = torch.tensor([0, 1])


def value_error(device: str, message: str) -> AbstractContextManager[object]:
    """Expect what a wrong value in a tensor does: CUDA does not look and skips the row."""
    return pytest.raises(ValueError, match=message) if device == "cpu" else nullcontext()


def on(device: str, value: object) -> object:
    """Move a tensor with its strides, which .to() does not keep."""
    if not isinstance(value, torch.Tensor):
        return value
    moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return moved.copy_(value)


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, r"key must be a torch.Tensor; got list", {"key": [1]}),
        (TypeError, "key: dtype must be .*float32.*got int32", {"key": KEY.int()}),
        (TypeError, "value: dtype must be float32, got bfloat16", {"value": VALUE.bfloat16()}),
        (TypeError, "slot_mapping: dtype must be int32 or int64", {"slot_mapping": SLOTS.float()}),
        (ValueError, r"value: shape must be \[2, 3, \*\]", {"value": VALUE[:, :2]}),
        (ValueError, r"key_cache: shape must be \[\*, \*, 3, 16\]", {"key": KEY[..., :16]}),
        (ValueError, "key: the last dimension must be contiguous", {
            "key": torch.zeros(2, HEADS, 2 * QK)[..., ::2],
        }),
    ],
)  # fmt: skip
def test_bad_appends_write_nothing(
    device: str, error: type[Exception], message: str, changed: dict[str, object]
) -> None:
    cache = make_cache("NHD", torch.float32)
    tensors = {"key": KEY, "value": VALUE, "slot_mapping": SLOTS, **changed}
    arguments = {name: on(device, tensor) for name, tensor in tensors.items()}
    with pytest.raises(error, match=message):
        fi_backend.append_to_cache(kv_cache=cache, **arguments)
    assert all(bool((part == 7).all()) for part in cache)


@pytest.mark.parametrize("slot", [PAGES * PAGE_SIZE, 2**31 + 1, 2**40])
def test_slots_outside_the_cache(device: str, slot: int) -> None:
    cache = make_cache("NHD", torch.float32)
    message = rf"slot_mapping: must be below 7 pages \* 4 tokens.*slot_mapping\[1\] = {slot}"
    with value_error(device, message):
        fi_backend.append_to_cache(
            KEY.to(device), VALUE.to(device), cache, torch.tensor([-1, slot])
        )
    assert all(bool((part == 7).all()) for part in cache)


def test_bad_scales_and_cache_dtypes(device: str) -> None:
    key, value, slots = KEY.to(device), VALUE.to(device), SLOTS.to(device)
    cache = make_cache("NHD", torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="k_scale: must be above 0, got 0"):
        fi_backend.append_to_cache(key, value, cache, slots, k_scale=0.0)
    with pytest.raises(ValueError, match=r"v_scale: shape must be \[3\], got \[2\]"):
        fi_backend.append_to_cache(key, value, cache, slots, v_scale=torch.ones(2))
    if device == "cpu":
        with pytest.raises(ValueError, match="v_scale: must be above 0, got -1"):
            fi_backend.append_to_cache(key, value, cache, slots, v_scale=torch.tensor(-1.0))
    e5m2 = torch.float8_e5m2
    with pytest.raises(TypeError, match="key_cache: dtype must be that of an fp8 key, float8_e5m2"):
        fi_backend.append_to_cache(key.to(e5m2), value.to(e5m2), cache, slots)
    assert all(bool((part.float() == 7).all()) for part in cache)


def test_index_tensors_of_other_dtypes(device: str) -> None:
    """int64 serves as int32 does; what does not fit is no place, and floats are no indices."""
    cache = make_cache("NHD", torch.float32)
    arguments = {
        "batch_indices": [0, 0],
        "positions": [0, 1],
        "kv_indices": [4],
        "kv_indptr": [0, 1],
        "kv_last_page_len": [2],
    }
    tensors = {name: torch.tensor(value) for name, value in arguments.items()}

    def append(**changed: torch.Tensor) -> None:
        rows = KEY.to(device), VALUE.to(device)
        fi_backend.append_paged_kv_cache(*rows, paged_kv_cache=cache, **tensors | changed)

    for name in ("batch_indices", "positions", "kv_indices", "kv_indptr"):
        with pytest.raises(TypeError, match=f"{name} must have dtype .*int64; got torch.float32"):
            append(**{name: tensors[name].float()})
    for name, value in (("batch_indices", 2**32), ("positions", 2**32 + 3), ("kv_indices", 2**40)):
        with value_error(device, "got request .* and position"):
            append(**{name: torch.full_like(tensors[name], value)})
    assert bool((cache[0] == 7).all())
    append()
    assert bool((cache[0][4, :2] == 0).all())


def test_a_cache_is_a_tensor_or_a_pair() -> None:
    indices = [torch.zeros(2, dtype=torch.int32)] * 5
    with pytest.raises(TypeError, match=r"paged_kv_cache must be a pair of tensors.*got NoneType"):
        fi_backend.append_paged_kv_cache(KEY, KEY, *indices[:2], None, *indices[2:])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"kv_cache must be a pair of tensors.*got NoneType"):
        fi_backend.append_to_cache(KEY, VALUE, None, SLOTS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("message", "changed", "pages_written"),
    [
        ("got request 3 and position 0 at index 1", {"batch_indices": [0, 3]}, [4]),
        ("got request 0 and position -1 at index 0", {"positions": [-1, 0]}, [6]),
        (
            "got request 1 and position 4 at index 1",
            {"positions": [0, 4], "batch_indices": [0, 1]},
            [4],
        ),
        ("must rise .* the size of kv_indices", {"kv_indptr": [0, 2, 3, 9]}, [4]),
        ("must rise .* the size of kv_indices", {"kv_indptr": [-9, -8, 2, 3]}, [6]),
        ("must rise .* the size of kv_indices", {"kv_indptr": [0, 2, 1, 3]}, [4, 1]),
        ("7 cached pages, got request 0", {"kv_indices": [7, 1, 6]}, [6]),
    ],
)
def test_rows_without_a_place(
    device: str, message: str, changed: dict[str, list[int]], pages_written: list[int]
) -> None:
    """The CPU refuses them and writes nothing; CUDA writes the other rows."""
    arguments = {
        "batch_indices": [0, 2],
        "positions": [0, 0],
        "kv_indices": [4, 1, 6],
        "kv_indptr": [0, 1, 2, 3],
        "kv_last_page_len": [2, 0, 3],
        **changed,
    }
    tensors = {name: torch.tensor(value).int() for name, value in arguments.items()}
    cache = torch.zeros(PAGES, 2, PAGE_SIZE, HEADS, QK)
    expected = cache.clone()
    if device == "cuda":
        expected[pages_written, :, 0] = 1
    rows = torch.ones(2, HEADS, QK)
    with value_error(device, message):
        fi_backend.append_paged_kv_cache(rows, rows, paged_kv_cache=cache, **tensors)
    assert torch.equal(cache, expected)


def test_page_table_shapes(device: str) -> None:
    batch_indices, positions, kv_indices, kv_indptr, _ = paged_case()
    rows, cache = torch.ones(6, HEADS, QK), torch.zeros(PAGES, 2, PAGE_SIZE, HEADS, QK)
    run = fi_backend.append_paged_kv_cache
    with pytest.raises(ValueError, match=r"kv_last_page_len must have shape \[3\]"):
        run(rows, rows, batch_indices, positions, cache, kv_indices, kv_indptr, kv_indptr)
    lens = kv_indptr[1:]
    with pytest.raises(ValueError, match="key: must have a row for each of the 6 tokens, got 5"):
        run(rows[:5], rows[:5], batch_indices, positions, cache, kv_indices, kv_indptr, lens)
    with pytest.raises(ValueError, match="kv_layout must be one of NHD, HND; got 'XYZ'"):
        run(*[rows] * 8, kv_layout="XYZ")
    assert cache.count_nonzero() == 0


def test_ragged_batches_with_bad_values(device: str) -> None:
    run = fi_backend.get_batch_indices_positions
    with value_error(device, "append_indptr: must rise from 0 or more to at most nnz = 4"):
        batch_indices, positions = run(torch.tensor([0, 5]), torch.tensor([9]), 4)
        assert batch_indices.tolist() == [0, 0, 0, 0]
        assert positions.tolist() == [4, 5, 6, 7]
    with value_error(device, r"seq_lens\[0\] = 3 for 4 appended tokens"):
        batch_indices, positions = run(torch.tensor([0, 4]), torch.tensor([3]), 4)
        assert positions.tolist() == [-1, 0, 1, 2]


@pytest.mark.usefixtures("device")
def test_bad_ragged_batches() -> None:
    run = fi_backend.get_batch_indices_positions
    indptr, lens = torch.tensor([0, 4]), torch.tensor([4])
    with pytest.raises(ValueError, match=r"positions must have shape \[nnz=4\]; got \[3\]"):
        run(indptr, lens, 4, positions=torch.zeros(3).int())
    with pytest.raises(TypeError, match=r"positions.* must .*int32.* got .*int64"):
        run(indptr, lens, 4, positions=torch.zeros(4).long())
    with pytest.raises(TypeError, match=r"append_indptr.*int32 or .*int64.* got .*float32"):
        run(indptr.float(), lens, 4)
    with pytest.raises(ValueError, match=r"seq_lens.* \[1\].* got \[2\]"):
        run(indptr, indptr, 4)
    with pytest.raises(ValueError, match=r"append_indptr.* \[num_requests \+ 1\].* got \[0\]"):
        run(indptr[:0], lens, 4)


def test_fewer_rows_than_slots_need_negative_slots(device: str) -> None:
    key, value = new_rows(2, torch.float32)
    cache = make_cache("NHD", torch.float32)
    fi_backend.append_to_cache(key, value, cache, torch.tensor([3, 4, -1, -1]))
    assert torch.equal(cache[0][0, 3], key[0])
    before = cache[0].clone()
    with value_error(device, "entries past the 2 rows of key must be negative"):
        fi_backend.append_to_cache(key, value, cache, torch.tensor([3, 4, -1, 5]))
    assert torch.equal(cache[0], before)


@pytest.mark.gpu
def test_tensors_on_two_devices() -> None:
    cache = make_cache("NHD", torch.float32)
    with pytest.raises(ValueError, match=r"key_cache: must be on device cuda:0, got cpu; move it"):
        fi_backend.append_to_cache(KEY.cuda(), VALUE.cuda(), cache, SLOTS.cuda())
    cache = tuple(part.cuda() for part in cache)
    with pytest.raises(ValueError, match=r"slot_mapping: must be on device cuda:0, got cpu"):
        fi_backend.append_to_cache(KEY.cuda(), VALUE.cuda(), cache, SLOTS)
