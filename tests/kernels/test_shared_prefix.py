"""The search for shared prefixes on the host: what it finds is shared, and worth it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_backend.kernels.shared_prefix import Groups, find_shared_prefixes
from tests.kernels.plan_step import CUT, plan_groups
from tests.kernels.shared_prefix_step import Branch, SharingStep, sharing_steps

HEADS = dict(num_qo_heads=8, num_kv_heads=2, head_dim_qk=64, head_dim_vo=64)
FEW_ROWS = 16  # packed rows of a few-row request on the CPU


def search(
    step: SharingStep,
    *,
    window_left: int = -1,
    min_tokens: int = 1,
    worth_keys: int = 0,
    max_rows: int = 256,
) -> Groups:
    groups = Groups.empty(len(step.nodes), max_rows, torch.device("cpu"))
    for tensor in (groups.own_lens, groups.first_pages, groups.group_lens, groups.group_tables):
        tensor.fill_(-7)
    find_shared_prefixes(
        groups,
        **step.lengths(),
        **step.page_table(),
        **HEADS,
        page_size=step.page_size,
        window_left=window_left,
        min_tokens=min_tokens,
        worth_keys=worth_keys,
    )
    return groups


@dataclass(frozen=True)
class Group:
    """A group as its tensors describe it."""

    q_rows: list[int]
    pages: list[int]  # that it shares


def groups_of(step: SharingStep, groups: Groups) -> tuple[list[Group], list[Group]]:
    """Return the groups of each level."""
    table = step.page_table()
    pages = table["page_indices"] if "page_indices" in table else table["block_table"].flatten()
    indptr, rows = groups.group_indptr.tolist(), groups.q_rows.tolist()
    found = []
    for group, length in enumerate(groups.group_lens.tolist()):
        assert length % step.page_size == 0
        place, count = int(groups.group_tables[group]), length // step.page_size
        shared = pages[place : place + count].tolist()
        found.append(Group(rows[indptr[group] : indptr[group + 1]], shared))
    first = len(found) // 3
    for group in found[:first]:
        assert bool(group.q_rows) == bool(group.pages)
    return [[x for x in level if x.q_rows] for level in (found[:first], found[first:])]


def pages_by_row(step: SharingStep, groups: Groups) -> dict[int, list[int]]:
    """Return the pages that each row of q shares, of both levels; check that these fit."""
    first, second = (
        [(row, group.pages) for group in level for row in group.q_rows]
        for level in groups_of(step, groups)
    )
    shared = dict(first)
    assert len(shared) == len(first)
    if second:
        assert [row for row, _ in second] == [row for row, _ in first]
        assert any(pages for _, pages in second)
    for row, pages in second:
        shared[row] = shared[row] + pages
    assert len(first) + len(second) == groups.group_indptr[-1]
    return shared


@given(sharing_steps(), st.integers(1, 40), st.sampled_from([-1, 0, 30, 100]))
@settings(deadline=None, max_examples=300)
def test_groups_share_full_pages_that_nobody_writes(
    step: SharingStep, min_tokens: int, window_left: int
) -> None:
    found = search(step, min_tokens=min_tokens, window_left=window_left)
    lengths, (lists, _) = step.lengths(), step.page_lists()
    by_row = pages_by_row(step, found)
    for r, (qo_len, first_row) in enumerate(
        zip(step.qo_lens, lengths["qo_indptr"].tolist(), strict=False)
    ):
        shared = int(found.first_pages[r])
        kv_len = int(lengths["kv_lens"][r])
        assert found.own_lens[r] == kv_len - shared * step.page_size
        rows = range(first_row, first_row + qo_len)
        if shared == 0:
            assert not any(row in by_row for row in rows)
            continue
        assert 0 < qo_len * 4 <= FEW_ROWS
        assert shared * step.page_size <= kv_len - qo_len
        assert shared * step.page_size >= min_tokens
        assert window_left < 0 or kv_len - 1 <= window_left
        for i, row in enumerate(rows):
            assert by_row[row] == lists[r][:shared]
            assert found.q_rows[int(found.first_rows[r]) + i] == row


@given(sharing_steps(), st.sampled_from([0, 64, 2048]))
@settings(deadline=None, max_examples=100)
def test_no_worker_walks_over_groups_that_do_not_exist(step: SharingStep, states: int) -> None:
    groups = search(step)
    plan = plan_groups(
        groups.group_indptr,
        groups.group_lens,
        num_qo_heads=HEADS["num_qo_heads"],
        num_kv_heads=HEADS["num_kv_heads"],
        head_dim=HEADS["head_dim_qk"],
        num_workers=40,
        kept_states=states or -1,
        target="sm_90",
    )
    if plan.has_work != CUT:
        return
    exists = groups.group_indptr.diff() > 0
    first, last = (int(exists.nonzero()[i]) for i in (0, -1))
    assert exists[first : last + 1].all()
    assert plan.starts[:, 0].min() >= first
    assert plan.starts[-1].tolist() == [last + 1, 0, 0, 0]


def flat(nodes: int, pages: int, requests: int, own: int = 40) -> SharingStep:
    """Return a step of requests in turn at one of some prefixes."""
    return SharingStep(
        tree=tuple(Branch(-1, pages) for _ in range(nodes)),
        nodes=tuple(i % nodes for i in range(requests)),
        own_lens=(own,) * requests,
        qo_lens=(1,) * requests,
        page_size=16,
        table="block_table",
    )


def at_nodes(step: SharingStep, nodes: tuple[int, ...]) -> SharingStep:
    """Return a step with other requests, of a row each, at nodes of its tree."""
    count = len(nodes)
    return replace(step, nodes=nodes, own_lens=(40,) * count, qo_lens=(1,) * count)


def test_every_prefix_has_a_group_in_any_order_of_requests() -> None:
    step = flat(3, 20, 21)
    found, _ = groups_of(step, search(step))
    assert [group.q_rows for group in found] == [list(range(i, 21, 3)) for i in range(3)]
    assert [len(group.pages) for group in found] == [20] * 3


def test_a_request_that_has_little_in_common_does_not_shorten_what_others_share() -> None:
    step = flat(1, 20, 12)
    step = replace(step, tree=(Branch(-1, 4), Branch(0, 16)), nodes=(1,) * 11 + (0,))
    found = search(step)
    assert found.first_pages.tolist() == [20] * 11 + [4]
    # With it in an outer group, all rows have two states, which must be worth it.
    found = search(step, worth_keys=4000)
    assert found.first_pages.tolist() == [20] * 11 + [0]


def test_branches_of_a_tree_have_groups_behind_that_of_the_root() -> None:
    step = flat(1, 30, 12)
    tree = (Branch(-1, 30), *[Branch(0, 120)] * 3)
    step = replace(step, tree=tree, nodes=(1, 2, 3) * 4)
    found = search(step, min_tokens=256)
    assert found.first_pages.tolist() == [150] * 12
    (root,), branches = groups_of(step, found)
    assert len(root.pages) == 30
    assert [len(group.pages) for group in branches] == [120] * 3
    assert [group.q_rows for group in branches] == [list(range(i, 12, 3)) for i in range(3)]
    # A group of the root that saves too little leaves the branches as they are.
    found = search(at_nodes(step, (1, 2, 3) * 8), min_tokens=256, worth_keys=20000)
    assert [len(group.pages) for group in groups_of(step, found)[0]] == [150] * 3
    assert groups_of(step, found)[1] == []
    # Of a pair behind what many share, the others are not left alone.
    pair = replace(step, tree=(Branch(-1, 100), Branch(0, 200)), nodes=(0,) * 10 + (1,) * 2)
    found = search(pair, min_tokens=256)
    assert found.first_pages.tolist() == [100] * 10 + [300] * 2
    (root,), behind = groups_of(step, found)
    assert sorted(root.q_rows) == list(range(12))
    assert [(group.q_rows, len(group.pages)) for group in behind] == [
        ([10, 11], 200),
        (list(range(10)), 0),
    ]


def test_trees_beside_each_other() -> None:
    """Three roots with two branches each, requests at roots, and a prefix without branches."""
    roots = [Branch(-1, 80 + i) for i in range(3)]
    tree = (*roots, *(Branch(i % 3, 200) for i in range(6)), Branch(-1, 70))
    step = at_nodes(replace(flat(1, 1, 1), tree=tree), tuple(i % 10 for i in range(48)))
    found = search(step, min_tokens=256)
    expected = [sum(tree[j].num_pages for j in (x, tree[x].parent) if j >= 0) for x in range(10)]
    assert found.first_pages.tolist() == [expected[i % 10] for i in range(48)]
    first, second = groups_of(step, found)
    assert sorted(len(group.pages) for group in first) == [70, 80, 81, 82]
    assert sorted(len(group.pages) for group in second if group.pages) == [200] * 6


def most_worth(saved: int, num_rows: int) -> int:
    """Return the largest worth_keys that groups of so many query rows reach."""
    worth = saved * 352 // (352 + num_rows)
    return max(n for n in (worth, worth + 1) if n + n * num_rows // 352 <= saved)


def test_what_saves_too_little_is_not_shared() -> None:
    step = flat(1, 20, 12)
    worth = most_worth((12 - 1) * 320 * 2, 12)  # keys of 2 heads, but for one reading
    assert search(step, worth_keys=worth).first_pages.tolist() == [20] * 12
    assert search(step, worth_keys=worth + 1).first_pages.tolist() == [0] * 12
    assert search(step, min_tokens=321).first_pages.tolist() == [0] * 12
    # 4 rows of 4 heads each are 16 packed rows: 8 requests take two readings of 64.
    rows = replace(step, nodes=(0,) * 8, own_lens=(40,) * 8, qo_lens=(4,) * 8)
    worth = most_worth((8 - 2) * 640, 32)
    assert search(rows, worth_keys=worth).first_pages.tolist() == [20] * 8
    assert search(rows, worth_keys=worth + 1).first_pages.tolist() == [0] * 8


def test_groups_without_room_are_not_formed() -> None:
    step = flat(3, 20, 21)
    found = search(step, max_rows=14)
    first, _ = groups_of(step, found)
    assert [group.q_rows for group in first] == [list(range(i, 21, 3)) for i in range(2)]
    assert found.first_pages.tolist() == [20, 20, 0] * 7


def test_requests_beyond_those_that_are_looked_at_keep_to_themselves() -> None:
    step = flat(1, 20, 1030)
    found = search(step, max_rows=2000)
    assert found.first_pages.tolist() == [20] * 1024 + [0] * 6


def test_the_same_key_page_behind_other_pages_is_not_a_prefix() -> None:
    step = flat(1, 20, 6)
    table = step.page_table()["block_table"]
    table[3, 2] += 1  # before the key page
    groups = Groups.empty(6, 64, torch.device("cpu"))
    find_shared_prefixes(
        groups,
        **step.lengths(),
        block_table=table,
        **HEADS,
        page_size=16,
        window_left=-1,
        min_tokens=160,
        worth_keys=0,
    )
    assert groups.first_pages.tolist() == [20, 20, 20, 0, 20, 20]
