"""The search for shared prefixes on a GPU writes what the host's writes."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_backend.kernels.device_plan import device_plan
from fi_backend.kernels.host_plan import host_plan, plan_buffer_ints
from fi_backend.kernels.shared_prefix import Groups, find_shared_prefixes
from tests.kernels.attention_cuda_case import planner_target
from tests.kernels.plan_step import HEADER
from tests.kernels.shared_prefix_step import Branch, SharingStep, sharing_steps

pytestmark = pytest.mark.gpu

HEADS = dict(num_qo_heads=8, num_kv_heads=2, head_dim_qk=64, head_dim_vo=64)


def search(step: SharingStep, device: str, groups: Groups | None = None, **options: Any) -> Groups:
    """Search on the host for a GPU, or on a GPU."""
    if groups is None:
        max_rows = options.pop("max_rows", 256)
        groups = Groups.empty(len(step.nodes), max_rows, torch.device(device))
    find_shared_prefixes(
        groups,
        **{name: x.to(device) for name, x in (step.lengths() | step.page_table()).items()},
        **HEADS,
        page_size=step.page_size,
        for_cuda=True,
        **({"window_left": -1, "min_tokens": 1, "worth_keys": 0} | options),
    )
    return groups


def check(step: SharingStep, **options: Any) -> Groups:
    """Compare both searches; return what they found."""
    expected, found = search(step, "cpu", **options), search(step, "cuda", **options)
    for field in fields(Groups):
        if field.name != "scratch":
            made = getattr(found, field.name).cpu()
            assert torch.equal(made, getattr(expected, field.name)), field.name
    assert found.scratch[0] == 0, "the next search begins with this counter"
    return expected


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


def test_long_prefixes_that_differ_in_one_page() -> None:
    step = SharingStep((Branch(-1, 5000),), (0,) * 9, (3,) * 9, (1,) * 9, 1, "block_table")
    for page in (0, 300, 1023, 1024, 4999):
        table = step.page_table()["block_table"]
        table[4, page] += 1
        found = {}
        for device in ("cpu", "cuda"):
            groups = found[device] = Groups.empty(9, 64, torch.device(device))
            find_shared_prefixes(
                groups,
                **{name: x.to(device) for name, x in step.lengths().items()},
                block_table=table.to(device),
                **HEADS,
                page_size=1,
                window_left=-1,
                min_tokens=256,
                worth_keys=0,
                for_cuda=True,
            )
        assert torch.equal(found["cuda"].first_pages.cpu(), found["cpu"].first_pages)
        # All nine save more where they part late than the other eight do.
        assert int(found["cpu"].first_pages[3]) == (4999 if page == 4999 else 5000)


def test_a_search_leaves_nothing_to_the_next() -> None:
    step = SharingStep(
        (Branch(-1, 40), Branch(-1, 50)), (0, 1) * 20, (9,) * 40, (1,) * 40, 16, "csr"
    )
    groups = search(step, "cuda")
    for nodes in ((-1,) * 40, (1, 0) * 20, (0,) * 40):
        other = replace(step, nodes=nodes)
        search(other, "cuda", groups)
        expected = search(other, "cpu")
        for name in ("own_lens", "first_pages", "group_indptr", "group_lens", "group_tables"):
            assert torch.equal(getattr(groups, name).cpu(), getattr(expected, name)), name


WORKERS = 40
PLAN: dict[str, Any] = dict(
    **HEADS, q_dtype=torch.bfloat16, kv_dtype=torch.bfloat16, num_workers=WORKERS, split=0
)


def many_row_line(plan: torch.Tensor, num_requests: int) -> list[torch.Tensor]:
    """Return the header of a plan, and the arrays of its many-row line."""
    costs, records = 2 * (num_requests + 1), 4 * (WORKERS + 1)
    sizes = [HEADER, *[costs] * 2, *[records] * 6, *[WORKERS + 1] * 2]
    header, *arrays = plan[: sum(sizes)].split(sizes)
    return [header, *arrays[1::2]]


@given(sharing_steps())
@settings(deadline=None, max_examples=100)
def test_steps_with_groups_are_planned_as_on_the_host(step: SharingStep) -> None:
    if not step.nodes:
        return
    groups = search(step, "cuda")
    on_host = Groups(*(getattr(groups, field.name).cpu() for field in fields(Groups)))
    num_groups = groups.group_lens.shape[0]
    sizes = [
        plan_buffer_ints(max_reqs=count, num_workers=WORKERS)
        for count in (len(step.nodes), num_groups)
    ]
    made, made_groups = (torch.full((n,), -7, dtype=torch.int32, device="cuda") for n in sizes)
    expected, expected_groups = (torch.full((n,), -7, dtype=torch.int32) for n in sizes)
    lengths = dict(qo_indptr=step.lengths()["qo_indptr"], kv_lens=on_host.own_lens)
    options = dict(causal=True, window_left=-1, many_rows_only=False)
    device_plan(
        plan_buffer=made,
        **{name: x.cuda() for name, x in lengths.items()},
        first_pages=groups.first_pages,
        group_plan=made_groups,
        group_indptr=groups.group_indptr,
        group_lens=groups.group_lens,
        **PLAN,
        **options,
    )
    target = planner_target()
    host_plan(
        plan_buffer=expected,
        **lengths,
        first_pages=on_host.first_pages,
        **PLAN,
        **options,
        target=target,
    )
    host_plan(
        plan_buffer=expected_groups,
        qo_indptr=on_host.group_indptr,
        kv_lens=on_host.group_lens,
        **PLAN,
        causal=False,
        window_left=-1,
        many_rows_only=True,
        target=target,
    )
    assert torch.equal(made.cpu(), expected)
    lines = many_row_line(made_groups.cpu(), num_groups), many_row_line(expected_groups, num_groups)
    for of_device, of_host in zip(*lines, strict=True):
        assert torch.equal(of_device, of_host)
