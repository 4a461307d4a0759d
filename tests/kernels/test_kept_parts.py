"""Plans of items whose parts keep states of their own: there is room for all of them."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.plan_step import CUT, WHOLE, GroupPlan, plan_groups

MOST_PARTS = 16


def plan_parts(
    qo_lens: list[int],
    kv_lens: list[int],
    *,
    states: int,
    num_workers: int = 396,
    num_kv_heads: int = 8,
    target: Literal["cuda", "sm_90"] = "sm_90",
    second_len: int | None = None,
    head_dim: int = 128,
) -> GroupPlan:
    """Plan groups, four query heads to a kv head.

    A second level, of twice as many places, has no groups but those given.
    """
    qo_lens, kv_lens = ([*lens, *[0] * (2 * len(lens))] for lens in (qo_lens, kv_lens))
    if second_len is not None:
        qo_lens[len(qo_lens) // 3] = sum(qo_lens)
        kv_lens[len(kv_lens) // 3] = second_len
    return plan_groups(
        torch.tensor([0, *qo_lens]).cumsum(0).to(torch.int32),
        torch.tensor(kv_lens, dtype=torch.int32),
        num_qo_heads=4 * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_workers=num_workers,
        kept_states=states,
        target=target,
    )


@given(
    st.lists(st.tuples(st.integers(1, 200), st.integers(1, 70000)), min_size=1, max_size=12),
    st.integers(1, 20),
    st.integers(1, 400),
    st.sampled_from(["cuda", "sm_90"]),
)
@settings(deadline=None, max_examples=200)
def test_states_of_all_parts_fit(
    groups: list[tuple[int, int]],
    room: int,
    num_workers: int,
    target: Literal["cuda", "sm_90"],
) -> None:
    qo_lens, kv_lens = [rows for rows, _ in groups], [length for _, length in groups]
    states = room * sum(qo_lens)
    has_work, num_parts, starts, cuts = plan_parts(
        qo_lens,
        kv_lens,
        states=states,
        num_workers=num_workers,
        target=target,
    )
    assert 1 <= num_parts <= min(room, MOST_PARTS)
    assert num_parts == int(cuts[:, 2].max())
    # Places inside of one item are cuts of it, and make one part more than there are.
    inside = {tuple(start) for start in starts.tolist() if start[3] > 0}
    items = [start[:3] for start in inside]
    assert num_parts == 1 + max((items.count(item) for item in items), default=0)
    assert has_work == (CUT if room > 1 else WHOLE)


@pytest.mark.parametrize(
    ("rows", "length", "num_parts"),
    [
        (128, 8192, 4),
        (32, 2048, 8),
        (256, 32768, 2),
        (16, 16384, 14),
        (16, 1024, 4),
        (32, 256, 1),
    ],
)
def test_equal_items_have_as_many_parts_as_keep_the_processors_busy(
    rows: int, length: int, num_parts: int
) -> None:
    assert plan_parts([rows], [length], states=2048)[1] == num_parts


@pytest.mark.parametrize("second_len", [0, 100, 8192])
def test_a_row_has_as_many_states_of_each_level(second_len: int) -> None:
    for states in (256, 512, 1024, 2048):
        has_work, num_states, _, cuts = plan_parts(
            [128], [8192], states=states, second_len=second_len
        )
        assert num_states == 2 * int(cuts[:, 2].max())
        assert num_states * 128 <= states
        assert has_work == (CUT if states > 256 else WHOLE)


@pytest.mark.parametrize(
    ("groups", "rows", "head_dim", "tile_rows"),
    [(1, 256, 64, 192), (1, 128, 64, 192), (1, 100, 64, 192), (3, 40, 128, 128), (2, 9, 128, 128)],
)
def test_tiles_that_are_not_full_are_shared_like_full_ones(
    groups: int, rows: int, head_dim: int, tile_rows: int
) -> None:
    """Tiles take a GPU equally long, so nobody has many more keys to go through than others."""
    length, num_heads = 12000, 8
    _, _, starts, _ = plan_parts(
        [rows] * groups, [length] * groups, states=16 * groups * rows, head_dim=head_dim
    )
    tiles = -(-4 * rows // tile_rows)
    request, head, tile, token = starts.long().unbind(1)
    end = groups * num_heads * tiles * length
    begins = ((request * num_heads + head) * tiles + tile) * length + token
    keys = begins.clamp(max=end).diff()
    busy = keys[keys > 0]
    assert keys.sum() == end
    assert busy.max() <= 1.05 * busy.double().mean() + 64  # pieces are multiples of 64
