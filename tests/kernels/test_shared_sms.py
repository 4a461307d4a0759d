"""How the planner divides the multiprocessors between the lines of a step, on sm_90."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from tests.kernels.plan_step import FEW_ROW_BLOCKS, HAS_WORK, WHOLE, Step, pieces, starts, steps
from tests.kernels.test_host_plan import cost

# What a unit of cost of each line takes: plan/shared_sms.h.
FEW_TIME, MANY_TIME = 3, 1


@given(steps(max_len=20000, targets=("sm_90",)))
@settings(deadline=None, max_examples=200)
def test_no_block_begins_with_both_lines(step: Step) -> None:
    """Steps of one kind are planned as if there were no other."""
    buffer = step.plan()
    num_sms = (step.num_workers + 2) // 3
    blocks = int(buffer[FEW_ROW_BLOCKS])
    has_few, has_many = (bool(buffer[HAS_WORK + line]) for line in (0, 1))
    has_few_rows = sum(step.qo_lens) <= len(step.qo_lens) * (8 // step.group_size)
    if not has_few:
        assert blocks == 0
        return
    if not has_many or has_few_rows or num_sms < 2:
        assert blocks == step.num_workers
        alone = replace(step, target="cuda")
        assert starts(step, buffer, 0) == starts(alone, alone.plan(), 0)
        return
    assert 0 < blocks < num_sms
    few, many = (pieces(step, buffer, line) for line in (0, 1))
    assert not any(few[blocks:])
    if buffer[HAS_WORK + 1] != WHOLE:
        assert not any(many[num_sms - blocks :])


@pytest.mark.parametrize(
    ("decodes", "prefills", "blocks"),
    [
        (((1, 4096),) * 64, ((2048, 2048),), 97),
        (((1, 2048),) * 128, ((2048, 2048),) * 2, 77),
        (((1, 1024),) * 256, ((512, 8192),), 81),
        (((1, 4000),) * 20, ((8000, 8000),), 7),
    ],
    ids=["64 and 2048", "128 and 2 x 2048", "256 and 512 of 8192", "20 and 8000"],
)
def test_both_lines_end_together(
    decodes: tuple[tuple[int, int], ...], prefills: tuple[tuple[int, int], ...], blocks: int
) -> None:
    """By their costs; rather the many-row line later, with which all others help."""
    qo_lens, kv_lens = zip(*decodes, *prefills, strict=True)
    step = Step(qo_lens, kv_lens, 4, 8, True, -1, 396, 0, False, "sm_90")
    buffer = step.plan()
    assert buffer[FEW_ROW_BLOCKS] == blocks
    few, many = (
        sum(cost(step, line, *piece) for owned in pieces(step, buffer, line) for piece in owned)
        for line in (0, 1)
    )
    assert FEW_TIME * few / blocks < 1.02 * MANY_TIME * many / (132 - blocks)
    assert FEW_TIME * few / (blocks - 1) > 0.98 * MANY_TIME * many / (133 - blocks)


@pytest.mark.parametrize(
    ("decodes", "prefill", "blocks"),
    [(((5, 4096),) * 64, (16, 4096), 131), (((1, 64),), (8192, 8192), 1)],
    ids=["little prefill", "little decode"],
)
def test_each_line_has_a_multiprocessor_at_least(
    decodes: tuple[tuple[int, int], ...], prefill: tuple[int, int], blocks: int
) -> None:
    qo_lens, kv_lens = zip(*decodes, prefill, strict=True)
    step = Step(qo_lens, kv_lens, 4, 8, True, -1, 396, 0, False, "sm_90")
    assert step.plan()[FEW_ROW_BLOCKS] == blocks
