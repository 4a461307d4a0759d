"""What a GPU finds to be shared, and its plans, are what the host makes of a step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_backend.kernels.host_plan import host_plan, plan_buffer_ints
from fi_backend.kernels.shared_prefix import Groups, find_shared_prefixes, shared_plan
from tests.kernels.attention_cuda_case import planner_target
from tests.kernels.plan_step import many_row_line
from tests.kernels.shared_prefix_step import Branch, SharingStep, sharing_steps

pytestmark = pytest.mark.gpu

HEADS = dict(num_qo_heads=8, num_kv_heads=2, head_dim_qk=64, head_dim_vo=64)
DTYPES = dict(q_dtype=torch.bfloat16, kv_dtype=torch.bfloat16)
SEARCH = dict(window_left=-1, min_tokens=1, worth_keys=0)
WORKERS = 40
STATES = 1024  # of groups' rows that there is room for


def search(step: SharingStep, tables: dict[str, Any] | None = None, **options: Any) -> Groups:
    """Search on the host for a GPU."""
    groups = Groups.empty(len(step.nodes), options.pop("max_rows", 256), torch.device("cpu"))
    find_shared_prefixes(
        groups,
        **step.lengths(),
        **(tables or step.page_table()),
        **HEADS,
        page_size=step.page_size,
        for_cuda=True,
        **(SEARCH | options),
    )
    return groups


@dataclass(frozen=True)
class Planned:
    """What a GPU writes, in memory that may be used again."""

    groups: Groups
    plan: torch.Tensor
    group_plan: torch.Tensor

    @staticmethod
    def empty(num_requests: int, max_rows: int = 256) -> Planned:
        groups = Groups.empty(num_requests, max_rows, torch.device("cuda"))
        sizes = [
            plan_buffer_ints(max_reqs=count, num_workers=WORKERS)
            for count in (num_requests, groups.group_lens.shape[0])
        ]
        return Planned(
            groups, *(torch.full((n,), -7, dtype=torch.int32, device="cuda") for n in sizes)
        )

    def fill(
        self, step: SharingStep, tables: dict[str, Any] | None = None, **options: Any
    ) -> Planned:
        """Search and plan on the GPU; return this on the host."""
        tensors = step.lengths() | (tables or step.page_table())
        shared_plan(
            self.groups,
            plan_buffer=self.plan,
            group_plan=self.group_plan,
            group_states=STATES,
            **{name: x.cuda() for name, x in tensors.items()},
            **HEADS,
            **DTYPES,
            page_size=step.page_size,
            causal=True,
            num_workers=WORKERS,
            **(SEARCH | options),
        )
        groups = Groups(*(x.cpu() for x in self.groups.tensors()))
        return Planned(groups, self.plan.cpu(), self.group_plan.cpu())


def expect(step: SharingStep, groups: Groups, **options: Any) -> Planned:
    """Plan on the host what a search found."""
    made = Planned.empty(len(step.nodes))
    plan, group_plan = made.plan.cpu(), made.group_plan.cpu()
    common: dict[str, Any] = dict(
        **HEADS, **DTYPES, num_workers=WORKERS, split=0, target=planner_target()
    )
    host_plan(
        plan_buffer=plan,
        qo_indptr=step.lengths()["qo_indptr"],
        kv_lens=groups.own_lens,
        first_pages=groups.first_pages,
        causal=True,
        window_left=options.get("window_left", -1),
        many_rows_only=False,
        **common,
    )
    host_plan(
        plan_buffer=group_plan,
        qo_indptr=groups.group_indptr,
        kv_lens=groups.group_lens,
        causal=False,
        window_left=-1,
        many_rows_only=True,
        kept_states=STATES,
        **common,
    )
    return Planned(groups, plan, group_plan)


def check(
    step: SharingStep,
    tables: dict[str, Any] | None = None,
    memory: Planned | None = None,
    **options: Any,
) -> Groups:
    """Compare what a GPU writes with what the host does; return what they found."""
    max_rows = options.pop("max_rows", 256)
    memory = memory or Planned.empty(len(step.nodes), max_rows)
    made = memory.fill(step, tables, **options)
    groups = search(step, tables, max_rows=max_rows, **options)
    num_rows = int(groups.group_indptr[-1])
    names = ["own_lens", "first_pages"]
    if num_rows > 0:
        names += ["first_rows", "group_indptr", "group_lens", "group_tables"]
    for name in names:
        assert torch.equal(getattr(made.groups, name), getattr(groups, name)), name
    assert torch.equal(made.groups.q_rows[:num_rows], groups.q_rows[:num_rows])
    assert not made.groups.scratch[:2].any(), "the next search begins with these counters"
    expected = expect(step, groups, **options)
    assert torch.equal(made.plan, expected.plan)
    num_groups = groups.group_lens.shape[0]
    lines = [many_row_line(x.group_plan, num_groups, WORKERS) for x in (made, expected)]
    if num_rows == 0:  # its header and its workers' starts say that there is nothing to do
        lines = [[line[0], line[2]] for line in lines]
    for of_device, of_host in zip(*lines, strict=True):
        assert torch.equal(of_device, of_host)
    return groups


@given(sharing_steps(), st.integers(1, 40), st.sampled_from([-1, 0, 30, 100]))
@settings(deadline=None, max_examples=200)
def test_any_step(step: SharingStep, min_tokens: int, window_left: int) -> None:
    if step.nodes:
        check(step, min_tokens=min_tokens, window_left=window_left)


@pytest.mark.parametrize("num_requests", [1, 2, 31, 256, 257, 1023, 1024, 1025, 3000])
def test_many_requests(num_requests: int) -> None:
    generator = torch.Generator().manual_seed(num_requests)

    def draw(high: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, high, (num_requests,), generator=generator).tolist())

    step = SharingStep(
        tree=tuple(Branch(int(i > 0) * (i // 3) - 1, 300 + i) for i in range(9)),
        nodes=draw(9),
        own_lens=draw(200),
        qo_lens=tuple(1 + x // 9 for x in draw(20)),
        page_size=16,
        table="block_table",
    )
    for max_rows in (64, 1024):
        found = check(step, max_rows=max_rows, min_tokens=256, worth_keys=1000)
    assert bool((found.first_pages > 0).any()) == (num_requests > 2)


@pytest.mark.parametrize("num_workers", [1, 9, 31, 63])
def test_few_workers(num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which one warp would have one each, though two teams plan."""
    monkeypatch.setitem(globals(), "WORKERS", num_workers)
    tree = (Branch(-1, 40), Branch(0, 50))
    check(SharingStep(tree, (0, 1) * 8, (9,) * 16, (1,) * 16, 16, "csr"))


def test_long_prefixes_that_differ_in_one_page() -> None:
    step = SharingStep((Branch(-1, 5000),), (0,) * 9, (3,) * 9, (1,) * 9, 1, "block_table")
    for page in (0, 300, 1023, 1024, 4999):
        table = step.page_table()["block_table"]
        table[4, page] += 1
        found = check(step, {"block_table": table}, min_tokens=256)
        # All nine save more where they part late than the other eight do.
        assert int(found.first_pages[3]) == (4999 if page == 4999 else 5000)


def test_a_search_leaves_nothing_to_the_next() -> None:
    step = SharingStep(
        (Branch(-1, 40), Branch(-1, 50)), (0, 1) * 20, (9,) * 40, (1,) * 40, 16, "csr"
    )
    memory = Planned.empty(40)
    for nodes in ((0, 1) * 20, (-1,) * 40, (1, 0) * 20, (0,) * 40, (-1,) * 40):
        check(replace(step, nodes=nodes), memory=memory)


def test_a_mixed_step_is_planned_with_what_its_requests_share() -> None:
    step = SharingStep(
        (Branch(-1, 80),), (0,) * 24, (9,) * 24, (1,) * 20 + (100, 1, 300, 0), 16, "block_table"
    )
    found = check(step, min_tokens=256)
    assert int((found.first_pages > 0).sum()) == 21
