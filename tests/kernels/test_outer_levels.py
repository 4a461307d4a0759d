"""The batch of groups that levels make: on the host, and the same with its plans on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_backend.kernels.host_plan import host_plan, plan_buffer_ints
from fi_backend.kernels.outer_levels import (
    LevelGroups,
    LevelTable,
    level_plan,
    write_outer_levels,
)
from tests.kernels.attention_cuda_case import planner_target
from tests.kernels.plan_step import many_row_line

HEADS = dict(num_qo_heads=8, num_kv_heads=2, head_dim_qk=64, head_dim_vo=64)
TYPES = dict(q_dtype=torch.bfloat16, kv_dtype=torch.bfloat16)
WORKERS = 40
STATES = 256
Step = tuple[torch.Tensor, torch.Tensor, list[LevelTable]]


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def offsets(lens: list[int]) -> torch.Tensor:
    return int32([sum(lens[:i]) for i in range(len(lens) + 1)])


@st.composite
def steps(draw: st.DrawFn, most_keys: int = 3000) -> Step:
    """Draw qo_indptr and kv_lens of a step, and one or two levels of all its rows."""
    qo_lens = draw(st.lists(st.integers(0, 4), min_size=1, max_size=40))
    rows, levels = sum(qo_lens), []
    for _ in range(draw(st.integers(1, 2))):
        bounds = [0, *sorted(draw(st.lists(st.integers(0, rows), max_size=12))), rows]
        pages = [draw(st.integers(0, 9)) for _ in bounds[1:]]
        keys = [draw(st.integers(0, most_keys)) for _ in bounds[1:]]
        levels.append(LevelTable(int32(bounds), int32(keys), offsets(pages), sum(pages) + 2))
    own = [draw(st.integers(0, 300)) for _ in qo_lens]
    return offsets(qo_lens), int32(own), levels


def empty_groups(levels: list[LevelTable], max_rows: int) -> LevelGroups:
    device = levels[0].kv_lens.device
    groups = LevelGroups.empty([len(level.kv_lens) for level in levels], max_rows, device)
    for tensor in groups.tensors():
        tensor.fill_(-7)
    return groups


@given(steps(), st.integers(0, 3))
@settings(deadline=None, max_examples=100)
def test_a_batch_has_the_groups_of_all_levels(step: Step, more_rows: int) -> None:
    qo_indptr, _, levels = step
    rows = int(qo_indptr[-1])
    groups = empty_groups(levels, rows + more_rows)
    write_outer_levels(groups, qo_indptr=qo_indptr, levels=levels)
    indptr, places = groups.group_indptr, len(groups.group_lens)
    exists, first_page = torch.zeros(places, dtype=torch.bool), 0
    for i, level in enumerate(levels):
        # The first level ends where a third of the places does, the second begins there.
        count = len(level.kv_lens)
        begin = places // 3 - (count if i == 0 else 0)
        exists[begin : begin + count] = True
        assert torch.equal(indptr[begin : begin + count + 1], level.qo_indptr + i * rows)
        assert torch.equal(groups.group_lens[begin : begin + count], level.kv_lens)
        tables = groups.group_tables[begin : begin + count]
        assert torch.equal(tables, level.page_indptr[:-1] + first_page)
        first_page += level.num_pages
    assert not groups.group_lens[~exists].any()
    assert not indptr.diff()[~exists].any()
    assert indptr[-1] == len(levels) * rows
    assert groups.q_rows[: len(levels) * rows].tolist() == [*range(rows)] * len(levels)
    assert (groups.q_rows >= 0).all()


@given(steps(), st.data())
@settings(deadline=None, max_examples=100)
def test_whatever_offsets_are_a_level_has_the_rows_of_the_step(step: Step, data: Any) -> None:
    """A GPU's are not checked: rows without a state, or beyond its memory, would be read."""
    qo_indptr, _, levels = step
    rows = int(qo_indptr[-1])
    for level in levels:
        level.qo_indptr.copy_(
            int32([data.draw(st.integers(-9, rows + 9)) for _ in level.qo_indptr]).sort().values
        )
    groups = empty_groups(levels, rows)
    write_outer_levels(groups, qo_indptr=qo_indptr, levels=levels)
    indptr, end = groups.group_indptr, len(groups.group_lens) // 3
    assert indptr[0] == 0
    assert indptr[end] == rows
    assert indptr[-1] == len(levels) * rows
    assert (indptr.diff() >= 0).all()


def plan_on_host(step: Step, groups: LevelGroups) -> tuple[torch.Tensor, torch.Tensor]:
    """Plan a step and its groups for the GPU at hand."""
    qo_indptr, kv_lens, _ = step
    common: dict[str, Any] = dict(**HEADS, **TYPES, num_workers=WORKERS, split=0, window_left=-1)
    plans = [empty_plan(len(kv_lens)), empty_plan(len(groups.group_lens))]
    lengths = ((qo_indptr, kv_lens), (groups.group_indptr, groups.group_lens))
    for plan, (indptr, lens), is_groups in zip(plans, lengths, (False, True), strict=True):
        host_plan(
            plan_buffer=plan,
            qo_indptr=indptr,
            kv_lens=lens,
            causal=not is_groups,
            many_rows_only=is_groups,
            kept_states=STATES if is_groups else 0,
            target=planner_target(),
            **common,
        )
    return plans[0], plans[1]


def empty_plan(num_requests: int) -> torch.Tensor:
    size = plan_buffer_ints(max_reqs=num_requests, num_workers=WORKERS)
    return torch.full((size,), -7, dtype=torch.int32)


@pytest.mark.gpu
@given(steps(most_keys=70000))
@settings(deadline=None, max_examples=100)
def test_a_gpu_plans_what_the_host_does(step: Step) -> None:
    qo_indptr, kv_lens, levels = step
    on_gpu = [LevelTable(*(x.cuda() for x in level[:3]), level.num_pages) for level in levels]
    groups = empty_groups(on_gpu, int(qo_indptr[-1]))
    plan = empty_plan(len(kv_lens)).cuda()
    group_plan = empty_plan(len(groups.group_lens)).cuda()
    level_plan(
        groups,
        plan_buffer=plan,
        group_plan=group_plan,
        group_states=STATES,
        qo_indptr=qo_indptr.cuda(),
        kv_lens=kv_lens.cuda(),
        levels=on_gpu,
        causal=True,
        num_workers=WORKERS,
        **HEADS,
        **TYPES,
    )
    expected = empty_groups(levels, int(qo_indptr[-1]))
    write_outer_levels(expected, qo_indptr=qo_indptr, levels=levels)
    for got, wanted in zip(groups.tensors(), expected.tensors(), strict=True):
        assert torch.equal(got.cpu(), wanted)
    own, of_groups = plan_on_host(step, expected)
    assert torch.equal(plan.cpu(), own)
    places = len(expected.group_lens)
    for got, wanted in zip(
        many_row_line(group_plan.cpu(), places, WORKERS),
        many_row_line(of_groups, places, WORKERS),
        strict=True,
    ):
        assert torch.equal(got, wanted)
