"""Properties of the planner: all work exactly once, balanced, deterministic, in bounds."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings

from fi_backend.kernels.host_plan import host_plan, plan_buffer_ints, workspace_floats
from tests.kernels.plan_step import (
    CUT,
    HAS_WORK,
    TILE_ROWS,
    WHOLE,
    Step,
    items,
    pieces,
    starts,
    steps,
    visible,
    without_rows,
)

ITEM_OVERHEAD = {"cpu": 4, "cuda": 16, "sm_90": 16}
MAX_CHUNKS = 16


@given(steps())
@settings(deadline=None, max_examples=300)
def test_every_item_is_covered_exactly_once(step: Step) -> None:
    buffer = step.plan()
    for line in (0, 1):
        listed = items(step, line)
        assert bool(buffer[HAS_WORK + line]) == bool(listed)
        covered: dict[tuple, list[tuple[int, int]]] = {item: [] for item, _ in listed}
        for owned in pieces(step, buffer, line):
            for item, begin, end in owned:
                covered[item].append((begin, end))
        for item, tokens in listed:
            parts = covered[item]
            assert parts[0][0] == 0
            assert parts[-1][1] == tokens
            assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))


@given(steps())
@settings(deadline=None, max_examples=200)
def test_a_worker_shares_at_most_two_items(step: Step) -> None:
    buffer = step.plan()
    for line in (0, 1):
        tokens_of = dict(items(step, line))
        for owned in pieces(step, buffer, line):
            cut = [i for i, (item, a, b) in enumerate(owned) if b - a < tokens_of[item]]
            assert all(i in (0, len(owned) - 1) for i in cut)


@given(steps())
@settings(deadline=None, max_examples=200)
def test_splits_do_not_depend_on_batch_or_workers(step: Step) -> None:
    buffer = step.plan()
    for line in (0, 1):
        tokens_of = dict(items(step, line))
        for owned in pieces(step, buffer, line):
            for item, begin, end in owned:
                tokens = tokens_of[item]
                if step.split == -1 or (step.split > 0 and line == 1):
                    assert (begin, end) == (0, tokens)
                elif step.split > 0:
                    chunk = step.split * max(1, -(-tokens // (step.split * MAX_CHUNKS)))
                    assert begin % chunk == 0
                    assert end % chunk == 0 or end == tokens


def cost(step: Step, line: int, item: tuple[int, int, int], begin: int, end: int) -> float:
    """Weigh a piece by its rows, as kernels spend time: those of a GPU on full tiles."""
    qo_len, kv_len = step.qo_lens[item[0]], step.kv_lens[item[0]]
    rows = qo_len * step.group_size
    tile_rows = TILE_ROWS[step.target]
    if line == 1:
        rows = min(tile_rows, rows - item[2] * tile_rows)
    if step.causal:  # early rows of a tile do not see its last keys: half a triangle is skipped
        last_row = item[2] * tile_rows + rows - 1
        _, item_end = visible(step, qo_len, kv_len, last_row // step.group_size)
        item_begin, _ = visible(step, qo_len, kv_len, item[2] * tile_rows // step.group_size)
        end = min(end, item_end - item_begin - rows // step.group_size // 2)
    if line == 1 and step.target != "cpu":
        rows = tile_rows
    return max(0, end - begin) * (-(-rows // 16) + 1) / 16 + ITEM_OVERHEAD[step.target]


@given(steps(max_len=20000))
@settings(deadline=None, max_examples=200)
def test_work_is_balanced(step: Step) -> None:
    if step.split != 0:
        return
    buffer = step.plan()
    for line in (0, 1):
        if buffer[HAS_WORK + line] == WHOLE:
            continue
        owned = pieces(step, buffer, line)
        costs = [sum(cost(step, line, *piece) for piece in of_worker) for of_worker in owned]
        active = step.num_workers
        if step.target != "cpu":  # some get no work: see the tests below
            active = max((w + 1 for w, of_worker in enumerate(owned) if of_worker), default=1)
        # A cut moves by at most min_piece_tokens at either side, and a causal tile is estimated.
        slack = 2 * (128 + 256) * (256 // 16 + 1) / 16
        assert max(costs) <= sum(costs) / active + slack


def test_totals_beyond_int32() -> None:
    step = Step((1,) * 5, (2**31 - 1,) * 5, 8, 128, True, -1, 7, 0, False)
    buffer = step.plan()
    shares = [sum(end - begin for _, begin, end in owned) for owned in pieces(step, buffer, 0)]
    assert sum(shares) == 5 * 128 * (2**31 - 1)
    assert max(shares) - min(shares) < 10**4


def test_a_long_request_is_planned_at_once() -> None:
    """Costs of its 65536 tiles have a closed form; adding them up takes seconds a worker."""
    step = Step((1 << 20, 1), (1 << 20, 5), 16, 2, True, 4095, 4, 0, False)
    buffer = step.plan()
    tokens = [sum(end - begin for _, begin, end in owned) for owned in pieces(step, buffer, 1)]
    assert max(tokens) - min(tokens) < 0.01 * sum(tokens)
    many = Step((1 << 27,), (1 << 27,), 64, 8, True, -1, 10_000, 0, True)
    assert starts(many, many.plan(), 1) == sorted(set(starts(many, many.plan(), 1)))


@pytest.mark.parametrize(
    ("qo_len", "kv_lens", "active"),
    [
        (1, (1024,), 128),
        (1, (8192,), 128),
        (1, (131_072,), 128),
        (1, (131_072, 100), 132),
        (1, (1024,) * 4, 128),
        (1, (1024,) * 8, 128),
        (1, (1024,) * 5, 120),
        (1, (200,) * 5, 120),
        (1, (3000,) * 5, 132),
        (1, (1024,) * 10, 132),
        (1, (4096,) * 8, 128),
        (5, (4096,) * 64, 132),
        (1, (4096,) * 64, 256),
        (1, (1024,) * 65, 260),
        (1, (1024,) * 128, 396),
        (1, (777,) * 25, 396),
        (1, (*(4096,) * 63, 4000), 396),
        (1, (16,), 8),
        (1, (100,) * 17, 132),
        (1, (1024,) * 17, 396),
        (1, (1024,) * 32, 256),
        (1, (1024,) * 48, 384),
    ],
    ids=str,
)
def test_teams_get_work_that_is_worth_a_merge(
    qo_len: int, kv_lens: tuple[int, ...], active: int
) -> None:
    """One team an SM for few items or little work, otherwise three.

    The merge of an item's pieces is a tail that nothing hides. Equal items are not cut where one or
    two whole ones for each of two teams an SM leave few without work.
    """
    lens = (qo_len,) * len(kv_lens), kv_lens
    step = Step(*lens, 4, 8, True, -1, 396, 0, False, "cuda")
    assert sum(map(bool, pieces(step, step.plan(), 0))) == active


@pytest.mark.parametrize(("requests", "most"), [(8, 4), (64, 33), (3, 2)])
def test_fixed_chunks_are_spread_evenly_over_multiprocessors(requests: int, most: int) -> None:
    """512 chunks on 132 SMs are four at least; pairs on some of three blocks would make six."""
    lens = (1,) * requests, (4096,) * requests
    step = Step(*lens, 4, 8, True, -1, 396, 512, False, "cuda")
    of_sm = [0] * 132
    for worker, owned in enumerate(pieces(step, step.plan(), 0)):
        of_sm[worker % 132] += sum(-(-(end - begin) // 512) for _, begin, end in owned)
    assert max(of_sm) <= most


def test_equal_items_that_fill_the_blocks_are_not_cut() -> None:
    step = Step((1,) * 32, (1000,) * 32, 4, 8, True, -1, 396, 0, False, "cuda")
    assert [len(owned) for owned in pieces(step, step.plan(), 0)] == [1] * 256 + [0] * 140
    uneven = Step((1,) * 32, (1000,) * 31 + (2000,), 4, 8, True, -1, 396, 0, False, "cuda")
    assert sum(map(bool, pieces(uneven, uneven.plan(), 0))) > 256


def test_lengths_that_no_engine_means_are_empty() -> None:
    """On a device nobody can refuse them."""
    step = Step((0, 5, 0, 300, 1), (40, 0, 9, 400, 30), 4, 2, True, -1, 7, 0, False, "cuda")
    buffer = step.buffer()
    host_plan(
        plan_buffer=buffer,
        qo_indptr=torch.tensor([-4, 2, 7, 3, 303, 304], dtype=torch.int32),
        kv_lens=torch.tensor([40, -1, 9, 400, 30], dtype=torch.int32),
        **step.geometry(),
        target=step.target,
    )
    assert torch.equal(without_rows(buffer, 7), without_rows(step.plan(), 7))


@given(steps())
@settings(deadline=None, max_examples=200)
def test_workers_find_the_request_they_begin_with(step: Step) -> None:
    buffer = step.plan()
    workers = step.num_workers + 1
    spans = buffer[-(2 * 5 * workers) : -(2 * workers)].view(2, workers, 4).tolist()
    first_rows = step.lengths()["qo_indptr"].tolist()
    for line in (0, 1):
        for (request, *_), span in zip(starts(step, buffer, line), spans[line], strict=True):
            if request == len(step.qo_lens):
                assert span == [0, 0, 0, 0]
            else:
                lens = [step.qo_lens[request], step.kv_lens[request]]
                assert span == [first_rows[request], *lens, 0]


@given(steps())
@settings(deadline=None, max_examples=200)
def test_workers_find_who_shares_their_item(step: Step) -> None:
    buffer = step.plan()
    workers = step.num_workers + 1
    cuts = buffer[-(2 * 9 * workers) : -(2 * 5 * workers)].view(2, workers, 4).tolist()
    for line in (0, 1):
        edges = starts(step, buffer, line)
        for w, (*item, offset) in enumerate(edges):
            if offset == 0:
                assert cuts[line][w] == [w, 0, 1, 0]
                continue
            inside = [v for v, place in enumerate(edges) if [*place[:3]] == item and place[3] > 0]
            offsets = sorted({edges[v][3] for v in inside})
            rank = offsets.index(offset) + 1
            assert cuts[line][w] == [inside[0] - 1, rank, len(offsets) + 1, 0]


@given(steps())
@settings(deadline=None, max_examples=200)
def test_workers_begin_at_items(step: Step) -> None:
    """Never past the last key of one: the run would step to the next before it can load."""
    buffer = step.plan()
    for line in (0, 1):
        tokens_of = dict(items(step, line))
        for request, head, tile, offset in starts(step, buffer, line):
            is_next_request = (head, tile, offset) == (0, 0, 0)
            assert is_next_request or offset < max(1, tokens_of[request, head, tile])


def test_counters_start_at_zero() -> None:
    step = Step((1, 300, 2), (5000, 300, 7), 4, 2, True, -1, 6, 0, False)
    assert (step.plan()[-2 * (step.num_workers + 1) :] == 0).all()


def test_same_lengths_give_the_same_plan() -> None:
    step = Step((1, 300, 2), (5000, 300, 7), 4, 2, True, -1, 6, 0, False)
    assert torch.equal(step.plan(), step.plan())


def test_no_requests() -> None:
    step = Step((), (), 4, 2, True, -1, 3, 0, False)
    assert starts(step, step.plan(), 0) == [(0, 0, 0, 0)] * 4


def test_sizes_follow_from_capacities() -> None:
    assert plan_buffer_ints(max_reqs=100, num_workers=4) < 1000
    one = workspace_floats(num_workers=1, head_dim_qk=128, head_dim_vo=128)
    many = workspace_floats(num_workers=64, head_dim_qk=128, head_dim_vo=128)
    assert many <= 64 * one


@given(steps(targets=("cuda", "sm_90")))
def test_many_rows_have_a_worker_for_each_multiprocessor(step: Step) -> None:
    """Workspace is made for no more of them (attention/many_rows_shape.h)."""
    buffer = step.plan()
    if buffer[HAS_WORK + 1] == CUT:
        end = (len(step.qo_lens), 0, 0, 0)
        num_sms = (step.num_workers + 2) // 3
        assert set(starts(step, buffer, 1)[num_sms:]) == {end}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_workers": 0}, "num_workers from 1 to 16383, got"),
        ({"qo_indptr": torch.tensor([0, 5, 3], dtype=torch.int32)}, "never decrease, got 5 and 3"),
        ({"qo_indptr": torch.tensor([-1, 0, 3], dtype=torch.int32)}, "start at 0 or above"),
        ({"kv_lens": torch.tensor([4, -2], dtype=torch.int32)}, "at least 0, got -2 at index 1"),
        ({"qo_indptr": torch.zeros(2, dtype=torch.int32)}, r"shape must be \[3\], got \[2\]"),
        ({"kv_lens": torch.zeros(2)}, "kv_lens: dtype must be int32, got float32"),
        ({"num_qo_heads": 7}, "multiple of num_kv_heads, got 7 and 2"),
        ({"window_left": -2}, "window_left and split must be"),
        ({"plan_buffer": torch.zeros(8, dtype=torch.int32)}, "size it with plan_buffer_ints"),
        ({"plan_buffer": torch.zeros(202, dtype=torch.int32)[2:]}, "aligned to 16 bytes"),
        ({"target": "rocm"}, 'target must be "cpu", "cuda" or "sm_90"; got \'rocm\''),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "plan_buffer": torch.zeros(200, dtype=torch.int32),
        "qo_indptr": torch.tensor([0, 1, 2], dtype=torch.int32),
        "kv_lens": torch.tensor([4, 4], dtype=torch.int32),
        "num_qo_heads": 8,
        "num_kv_heads": 2,
        "head_dim_qk": 64,
        "head_dim_vo": 64,
        "q_dtype": torch.float32,
        "kv_dtype": torch.float32,
        "causal": True,
        "window_left": -1,
        "num_workers": 2,
        "split": 0,
        "many_rows_only": False,
    }
    with pytest.raises((ValueError, TypeError), match=message):
        host_plan(**(arguments | change))
