"""The cascade benchmark's steps: what requests share, what cascades are told, what is checked."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.cascade import BASE, NOTHING_SHARED, SWEEP, Contender, Ours, told_levels
from benchmarks.cascade_steps import Cell, levels_of, make_step, order_of
from benchmarks.decode_steps import expect, largest_error
from fi_backend import shared_prefixes

HEADS = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 64}
CELLS = (
    Cell(18, 272, 20, **HEADS),
    Cell(18, 64, 33, groups=3, **HEADS),
    Cell(24, 48, 7, groups=2, branches=3, behind=32, **HEADS),
    Cell(17, 0, 20, **HEADS),
)
CHOSEN = pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)


@CHOSEN
def test_requests_share_the_pages_of_their_group_and_branch(cell: Cell) -> None:
    step = make_step(cell, "cpu")
    prefix = cell.shared // cell.page_size
    inner = prefix + cell.behind // cell.page_size
    rows = [tuple(row.tolist()) for row in step.block_table]
    for begin, end, sharers in ((0, prefix, cell.groups), (prefix, inner, cell.num_branches)):
        for r, row in enumerate(rows):
            assert row[begin:end] == rows[r % sharers][begin:end]
    distinct = {page for row in rows for page in row}
    assert len(distinct) == step.k.shape[0]
    assert cell.num_bytes() <= step.k.nbytes + step.v.nbytes


@CHOSEN
def test_levels_are_the_page_tables(cell: Cell) -> None:
    """What a row sees on all levels together is its request's pages, in order."""
    step = make_step(cell, "cpu")
    levels = levels_of(cell, step)
    assert len(levels) == 1 + (cell.shared > 0) + (cell.behind > 0)
    for row, request in enumerate(order_of(cell).tolist()):
        pages, tokens = [], 0
        for level in levels:
            entry = int((level.qo_indptr <= row).sum()) - 1
            begin, end = level.kv_indptr[entry : entry + 2].tolist()
            pages += level.kv_indices[begin:end].tolist()
            tokens += (end - begin - 1) * cell.page_size + int(level.last_page_len[entry])
        assert pages == step.block_table[request].tolist()
        assert tokens == int(step.kv_lens[request])


@CHOSEN
def test_all_calls_compute_the_step(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefixes, "WORTH_KEYS", 0)
    monkeypatch.setattr(shared_prefixes, "MIN_TOKENS", cell.page_size)
    torch.manual_seed(0)
    step = make_step(cell, "cpu")
    expected = expect(step, range(cell.batch))
    shared, unshared = (Ours(step, shares=shares) for shares in (True, False))
    assert shared.num_sharing() == (cell.batch if cell.shared > 0 else 0)
    assert unshared.num_sharing() == 0
    contenders = {
        "shared": Contender(shared.plan_and_run),
        "unshared": Contender(unshared.plan_and_run),
        "cascade": Contender(told_levels("fi_backend", cell, step), order_of(cell)),
    }
    for name, contender in contenders.items():
        assert contender.error(contender.call(), expected) < 0.02, name


def test_a_row_of_nan_is_no_small_error() -> None:
    rows = {0: torch.zeros(2, 4), 1: torch.ones(2, 4)}
    out = torch.stack(list(rows.values()))
    assert largest_error(out, rows) == 0.0
    out[1, 0, 0] = math.nan
    assert math.isnan(largest_error(out, rows))


def test_every_cell_is_timed_once_and_fits() -> None:
    cells = (*BASE, *NOTHING_SHARED, *SWEEP)
    assert len({cell.name for cell in cells}) == len(cells)
    swept = {(cell.batch, cell.shared) for cell in cells if cell.own == 256 and cell.groups == 1}
    assert {(b, n) for b in (8, 256) for n in (512, 32768)} <= swept
    assert len(swept) >= 6 * 7
    assert max(cell.num_bytes() for cell in cells) < 2 << 30
