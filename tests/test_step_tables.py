"""gather_page_table() and pack_masks(): values, and what they must not touch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fi_backend import gather_page_table, pack_masks, packbits

UNTOUCHED = -7
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Rows of the token table: 5 requests of a step, out of order; one row serves two of them.
ROWS = [3, 0, 6, 3, 2]
LENS = [40, 1, 0, 17, 64]
MAX_TOKENS = 64


def token_table(page_size: int, device: str) -> torch.Tensor:
    """Random pages for 7 rows; slots past a request's tokens are garbage."""
    pages_each = MAX_TOKENS // page_size
    pages = torch.randperm(7 * pages_each).reshape(7, pages_each)
    slots = pages.repeat_interleave(page_size, 1) * page_size
    slots = slots + torch.arange(MAX_TOKENS) % page_size
    used = torch.zeros(7, dtype=torch.int64)
    for row, length in zip(ROWS, LENS, strict=True):
        used[row] = max(int(used[row]), length + 2)
    slots[torch.arange(MAX_TOKENS) >= used[:, None]] = 2**31 - 1
    padded = torch.full((7, MAX_TOKENS + 3), -1, dtype=torch.int32)
    padded[:, :MAX_TOKENS] = slots
    return padded.to(device)[:, :MAX_TOKENS]


def run(
    page_size: int, device: str, lens: list[int] = LENS, rows: list[int] = ROWS, **options: Any
) -> tuple[list[list[int]], list[int], torch.Tensor]:
    """Return what the call wrote of each request, its lengths, and the token table."""
    dtype = options.pop("dtype", torch.int64)
    max_pages = options.pop("max_pages", -(-MAX_TOKENS // page_size))
    table = token_table(page_size, device)
    pages = torch.full((len(lens), max_pages + 5), UNTOUCHED, dtype=torch.int32, device=device)
    kv_lens = torch.full((len(lens),), UNTOUCHED, dtype=torch.int32, device=device)
    gather_page_table(
        pages[:, :max_pages],
        kv_lens,
        table,
        torch.tensor(rows, dtype=dtype, device=device),
        torch.tensor(lens, dtype=dtype, device=device),
        page_size,
        **options,
    )
    written = [row[: row.index(UNTOUCHED)] for row in pages.tolist()]
    clean = [row[len(done) :] for row, done in zip(pages.tolist(), written, strict=True)]
    assert all(value == UNTOUCHED for row in clean for value in row)
    return written, kv_lens.tolist(), table.cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("page_size", [1, 16, 32])
def test_pages_of_the_requests(page_size: int, dtype: torch.dtype, device: str) -> None:
    written, kv_lens, table = run(page_size, device, dtype=dtype)
    assert kv_lens == LENS
    for row, length, pages in zip(ROWS, LENS, written, strict=True):
        assert pages == (table[row, :length:page_size] // page_size).tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_extra_tokens_join_every_request(device: str) -> None:
    written, kv_lens, table = run(1, device, lens=[40, 1, 0, 17, 62], extra_tokens=2)
    assert kv_lens == [42, 3, 2, 19, 64]
    assert written[0] == table[3, :42].tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_lengths_stop_where_a_row_does(device: str) -> None:
    _, kv_lens, _ = run(16, device, lens=[65, -1, 2**40, 7, 64], rows=[0, 1, 2, 7, -1])
    assert kv_lens == [64, 0, 64, 0, 0]
    written, kv_lens, _ = run(16, device, max_pages=2)
    assert kv_lens == [32, 1, 0, 17, 32]
    assert [len(pages) for pages in written] == [2, 1, 0, 2, 2]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_slots_of_another_pool(dtype: torch.dtype, device: str) -> None:
    slot_map = (torch.randperm(7 * MAX_TOKENS // 16) * 16).repeat_interleave(16).to(dtype)
    slot_map += torch.arange(7 * MAX_TOKENS, dtype=dtype) % 16
    slot_map[slot_map == 48] = -1
    written, _, table = run(16, device, slot_map=slot_map.to(device))
    for row, length, pages in zip(ROWS, LENS, written, strict=True):
        slots = slot_map[table[row, :length:16].long()].clamp(min=0)
        assert pages == (slots // 16).tolist()
    written, _, _ = run(16, device, slot_map=slot_map[:1].fill_(0).to(device))
    assert [set(pages) for pages in written] == [{0}, {0}, set(), {0}, {0}]


@pytest.mark.parametrize("device", DEVICES)
def test_a_long_request_among_many(device: str) -> None:
    table = torch.randint(0, 2**31, (9, 70_001), dtype=torch.int32, device=device)
    lens = torch.tensor([70_001, *[5] * 299], device=device)
    pages = torch.zeros(300, 70_001, dtype=torch.int32, device=device)
    kv_lens = torch.empty(300, dtype=torch.int32, device=device)
    rows = torch.arange(300, device=device) % 9
    gather_page_table(pages, kv_lens, table, rows, lens)
    assert torch.equal(pages[0], table[0])
    assert torch.equal(pages[1:, :5], table[rows[1:], :5])
    assert not pages[1:, 5:].any()


@pytest.mark.parametrize("device", DEVICES)
def test_branches_share_their_request(device: str) -> None:
    """3 drafts of 2 requests, of which 2 tokens are there, and room for 5 of each."""
    table = torch.arange(200, dtype=torch.int32, device=device).reshape(4, 50)
    rows, lens = torch.tensor([2, 0], device=device), torch.tensor([7, 0], device=device)
    pages = torch.full((6, 50), UNTOUCHED, dtype=torch.int32, device=device)
    kv_lens = torch.empty(6, dtype=torch.int32, device=device)
    gather_page_table(
        pages, kv_lens, table, rows, lens, extra_tokens=2, num_branches=3, branch_tokens=5
    )
    assert kv_lens.tolist() == [9, 9, 9, 2, 2, 2]
    for branch in range(3):
        first, second = (row[row != UNTOUCHED].tolist() for row in pages[branch::3])
        own = 5 * branch
        assert first == [*range(100, 107), 107 + own, 108 + own]
        assert second == [own, own + 1]


def test_nothing_to_do() -> None:
    empty = torch.empty(0, dtype=torch.int32)
    gather_page_table(
        empty.reshape(0, 4), empty, torch.zeros(1, 4, dtype=torch.int32), empty, empty
    )


def test_what_is_wrong_is_named() -> None:
    pages, kv_lens = torch.empty(2, 4, dtype=torch.int32), torch.empty(2, dtype=torch.int32)
    table, rows = torch.empty(3, 4, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="page_size: must be at least 1, got 0"):
        gather_page_table(pages, kv_lens, table, rows, rows, 0)
    with pytest.raises(TypeError, match="request_rows: dtype must be int32 or int64, got float32"):
        gather_page_table(pages, kv_lens, table, rows.float(), rows)
    with pytest.raises(ValueError, match=r"seq_lens: shape must be \[2\], got \[1\]"):
        gather_page_table(pages, kv_lens, table, rows, rows[:1])
    with pytest.raises(ValueError, match=r"page_table: shape must be \[4, \*\], got \[2, 4\]"):
        gather_page_table(pages, kv_lens, table, rows, rows, num_branches=2)
    with pytest.raises(ValueError, match="got 2, 1 and page_size 16"):
        gather_page_table(pages, kv_lens, table, rows, rows, 16, num_branches=2, branch_tokens=1)
    with pytest.raises(ValueError, match="slot_map: must not be empty"):
        gather_page_table(pages, kv_lens, table, rows, rows, slot_map=rows[:0])


def packed(masks: list[torch.Tensor], num_bytes: int, num_rows: int, device: str, cut: int) -> Any:
    """Return the bytes of each mask, after the last `cut` booleans were not there."""
    flat = torch.cat([mask.reshape(-1) for mask in masks]).to(device)
    bits = torch.full((len(masks), num_bytes), 0xA5, dtype=torch.uint8, device=device)
    kv_lens = torch.tensor([mask.shape[1] for mask in masks], dtype=torch.int32, device=device)
    pack_masks(bits, flat[: flat.numel() - cut], kv_lens, num_rows)
    return bits.cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_bits_of_each_mask(num_rows: int, device: str) -> None:
    masks = [torch.rand(num_rows, keys) < 0.5 for keys in (7, 0, 1, 2100, 64)]
    num_bytes = (num_rows * 2100 + 7) // 8
    for mask, bits in zip(masks, packed(masks, num_bytes, num_rows, device, 0), strict=True):
        want = packbits(mask.reshape(-1), "little")
        assert torch.equal(bits[: want.numel()], want)
        assert (bits[want.numel() :] == 0xA5).all()


@pytest.mark.parametrize("device", DEVICES)
def test_masks_that_are_not_there_are_true(device: str) -> None:
    masks = [torch.zeros(2, 6, dtype=torch.bool)] * 3
    bits = packed(masks, 2, 2, device, 16)
    assert bits.tolist() == [[0, 0], [0, 0b1111], [0xFF, 0b1111]]


@pytest.mark.parametrize("device", DEVICES)
def test_bits_that_do_not_fit_are_left_out(device: str) -> None:
    masks = [torch.ones(4, 10, dtype=torch.bool), torch.zeros(4, 3, dtype=torch.bool)]
    assert packed(masks, 3, 4, device, 0).tolist() == [[0xFF] * 3, [0, 0, 0xA5]]


def test_what_is_wrong_with_masks_is_named() -> None:
    bits, lens = torch.empty(2, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(TypeError, match="masks: dtype must be bool, got uint8"):
        pack_masks(bits, bits.view(-1), lens, 1)
    with pytest.raises(ValueError, match="bits: must be contiguous, got row stride 4"):
        pack_masks(bits[:, :2], bits.view(-1).bool(), lens, 1)
    with pytest.raises(ValueError, match="num_rows: must be at least 0, got -1"):
        pack_masks(bits, bits.view(-1).bool(), lens, -1)
