"""Items of the many-row line that are dealt whole: of which steps, and where the plan says so."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from tests.kernels.plan_step import (
    CUT,
    HAS_WORK,
    HEADER,
    WHOLE,
    Step,
    items,
    pieces,
    starts,
    steps,
)


@given(steps(targets=("cuda", "sm_90")))
@settings(deadline=None, max_examples=200)
def test_whole_items_are_counted(step: Step) -> None:
    """Blocks find what is dealt whole by the tiles of the requests before."""
    buffer = step.plan()
    assert buffer[HAS_WORK] != WHOLE
    if buffer[HAS_WORK + 1] != WHOLE:
        assert step.split == 0 or buffer[HAS_WORK + 1] == 0
        return
    requests = len(step.qo_lens)
    tiles = buffer[HEADER + 2 * (requests + 1) :][: 2 * (requests + 1)].view(torch.int64)
    listed = [request for (request, head, _), _ in items(step, 1) if head == 0]
    assert tiles.tolist() == [sum(r < n for r in listed) for n in range(requests + 1)]


@given(steps(targets=("cuda", "sm_90")))
@settings(deadline=None, max_examples=200)
def test_workers_begin_with_the_first_whole_items(step: Step) -> None:
    """Request by request, and the last query tiles of the first heads before others."""
    buffer = step.plan()
    if buffer[HAS_WORK + 1] != WHOLE:
        return
    begins = starts(step, buffer, 1)
    listed = [item for item, _ in items(step, 1)]
    count = min(len(listed), len(begins))
    assert begins[count:] == [(len(step.qo_lens), 0, 0, 0)] * (len(begins) - count)
    assert [begin[3] for begin in begins[:count]] == [0] * count
    taken = [begin[:3] for begin in begins[:count]]
    assert len(set(taken)) == count
    assert set(taken) <= set(listed)
    for n, (request, head, tile) in enumerate(taken):
        assert request == listed[n][0]
        last = max(t for r, _, t in listed if r == request)
        assert tile == last or (request, head, tile + 1) in taken[:n]
        assert head == 0 or any(r == request and h == head - 1 for r, h, _ in taken[:n])


@pytest.mark.parametrize(
    ("requests", "heads", "is_whole"),
    [
        (((512, 512),), 8, True),  # an item for each block, of lengths up to 512
        (((1024, 1024),), 8, True),
        (((8192, 8192),), 8, True),
        (((64, 4096),) * 8, 8, True),  # 128 equal items
        (((512, 8192),) * 4, 8, True),  # 512 equal items: the last round leaves 16 blocks idle
        (((544, 4096),), 8, False),  # 136 equal items: it leaves 128 of 132 idle
        (((300, 5000),) * 5, 8, True),  # 400 too, but parts would read K and V from memory
        (((256, 32768),), 8, False),  # half as many items as blocks
        (((4096, 4096),), 1, False),  # as many, but a few take most of the time
        (((64, 100_000), *[(300, 300)] * 16), 8, False),  # a long one among many short ones
    ],
    ids=str,
)
def test_long_items_are_cut_where_that_saves_more_than_a_merge(
    requests: tuple[tuple[int, int], ...], heads: int, is_whole: bool
) -> None:
    qo_lens, kv_lens = zip(*requests, strict=True)
    step = Step(qo_lens, kv_lens, 4, heads, True, -1, 396, 0, True, "sm_90")
    buffer = step.plan()
    assert buffer[HAS_WORK + 1] == (WHOLE if is_whole else CUT)
    if not is_whole:
        assert sum(map(bool, pieces(step, buffer, 1))) == 132
