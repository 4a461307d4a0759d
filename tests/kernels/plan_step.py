"""Steps to plan, for the tests of both planners."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from hypothesis import strategies as st

from fi_backend.kernels.host_plan import host_plan, plan_buffer_ints

# The plan begins with a header of so many ints (plan/work_line.h), with these places in it.
HEADER = 20
HAS_WORK = 16  # of each line
FEW_ROW_BLOCKS = 18
NUM_PARTS = 19
CUT, WHOLE = 1, 2  # what the header says of a line: plan/whole_items.h

# Of kernels for heads up to 128 wide: attention/cpu/scratch.h, attention/row_tiles.h and
# attention/few_rows_shape.h.
FEW_ROWS_LIMIT = {"cpu": 16, "cuda": 32, "sm_90": 32}
TILE_ROWS = {"cpu": 256, "cuda": 256, "sm_90": 128}


@dataclass(frozen=True)
class Step:
    """Inputs of a planner, on the host."""

    qo_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    group_size: int
    num_kv_heads: int
    causal: bool
    window_left: int
    num_workers: int
    split: int
    many_rows_only: bool
    target: Literal["cpu", "cuda", "sm_90"] = "cpu"

    def lengths(self) -> dict[str, torch.Tensor]:
        """Return the arguments that are tensors of the step."""
        return dict(
            qo_indptr=torch.tensor([0, *self.qo_lens]).cumsum(0).to(torch.int32),
            kv_lens=torch.tensor(self.kv_lens, dtype=torch.int32),
        )

    def buffer(self) -> torch.Tensor:
        """Return a buffer for the plan, full of poison."""
        size = plan_buffer_ints(max_reqs=len(self.qo_lens), num_workers=self.num_workers)
        return torch.full((size,), -7, dtype=torch.int32)

    def plan(self) -> torch.Tensor:
        """Plan on the host."""
        buffer = self.buffer()
        host_plan(plan_buffer=buffer, **self.lengths(), **self.geometry(), target=self.target)
        return buffer

    def geometry(self) -> dict[str, Any]:
        """Return all other arguments of a planner."""
        return dict(
            num_qo_heads=self.group_size * self.num_kv_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim_qk=128,
            head_dim_vo=128,
            q_dtype=torch.float32,
            kv_dtype=torch.float32,
            causal=self.causal,
            window_left=self.window_left,
            num_workers=self.num_workers,
            split=self.split,
            many_rows_only=self.many_rows_only,
        )


def without_rows(plan: torch.Tensor, num_workers: int) -> torch.Tensor:
    """Return a copy of a plan that does not know where requests begin in q."""
    plan = plan.clone()
    ints = 2 * (num_workers + 1)  # of the counters at the end, and a fourth of the spans before
    plan[-5 * ints : -ints].view(-1, 4)[:, 0] = 0
    return plan


@st.composite
def steps(
    draw: st.DrawFn, max_len: int = 3000, targets: tuple[str, ...] = ("cpu", "cuda", "sm_90")
) -> Step:
    """Draw a step of few requests."""
    count = draw(st.integers(0, 8))
    kv_lens = draw(st.lists(st.integers(0, max_len), min_size=count, max_size=count))
    qo_lens = draw(
        st.lists(st.sampled_from([0, 1, 1, 2, 5, 17, 300, 1000]), min_size=count, max_size=count)
    )
    return Step(
        tuple(qo_lens),
        tuple(kv_lens),
        group_size=draw(st.integers(1, 20)),
        num_kv_heads=draw(st.integers(1, 4)),
        causal=draw(st.booleans()),
        window_left=draw(st.sampled_from([-1, 0, 5, 100, 5000])),
        num_workers=draw(st.integers(1, 40)),
        split=draw(st.sampled_from([0, 0, -1, 1, 64, 300])),
        many_rows_only=draw(st.booleans()),
        target=draw(st.sampled_from(targets)),
    )


def visible(step: Step, qo_len: int, kv_len: int, row: int) -> tuple[int, int]:
    """Keys that a row sees, from the definition."""
    position = kv_len - qo_len + row
    end = max(0, min(kv_len, position + 1)) if step.causal else kv_len
    begin = max(0, position - step.window_left) if step.window_left >= 0 else 0
    return min(begin, end), end


def items(step: Step, line: int) -> list[tuple[tuple[int, int, int], int]]:
    """List ((request, head, tile), kv tokens) of a line in order."""
    listed = []
    for request, (qo_len, kv_len) in enumerate(zip(step.qo_lens, step.kv_lens, strict=True)):
        rows = qo_len * step.group_size
        is_few = rows <= FEW_ROWS_LIMIT[step.target] and not step.many_rows_only
        if qo_len == 0 or is_few != (line == 0):
            continue
        height = rows if is_few else TILE_ROWS[step.target]
        for head in range(step.num_kv_heads):
            for tile in range(-(-rows // height)):
                first, last = tile * height, min(rows, (tile + 1) * height) - 1
                begin, _ = visible(step, qo_len, kv_len, first // step.group_size)
                _, end = visible(step, qo_len, kv_len, last // step.group_size)
                listed.append(((request, head, tile), end - begin))
    return listed


def starts(step: Step, buffer: torch.Tensor, line: int) -> list[tuple[int, int, int, int]]:
    """Read where each worker begins, the end of the line last."""
    requests = len(step.qo_lens)
    begin = HEADER + 2 * 2 * (requests + 1) + line * 4 * (step.num_workers + 1)
    rows = buffer[begin : begin + 4 * (step.num_workers + 1)].view(-1, 4)
    return [tuple(row) for row in rows.tolist()]


def pieces(step: Step, buffer: torch.Tensor, line: int) -> list[list[tuple[tuple, int, int]]]:
    """List each worker's (item, begin, end) by cutting the line where the plan says."""
    if buffer[HAS_WORK + line] == WHOLE:
        return [[(item, 0, tokens)] for item, tokens in items(step, line)]
    edges = starts(step, buffer, line)
    assert edges == sorted(edges), "workers are out of order"
    owned: list[list[tuple[tuple, int, int]]] = [[] for _ in range(step.num_workers)]
    for item, tokens in items(step, line):
        for w in range(step.num_workers):
            low, high = edges[w], edges[w + 1]
            begin = low[3] if low[:3] == item else (0 if low[:3] < item else tokens)
            end = high[3] if high[:3] == item else (0 if high[:3] < item else tokens)
            holds_empty_item = tokens == 0 and low <= (*item, 0) < high
            if begin < end or holds_empty_item:
                owned[w].append((item, begin, end))
    return owned


class GroupPlan(NamedTuple):
    """Of the many-row line of a batch that groups make."""

    has_work: int
    num_parts: int
    starts: torch.Tensor  # [num_workers + 1, 4]
    cuts: torch.Tensor  # [num_workers + 1, 4]


def plan_groups(
    qo_indptr: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_workers: int,
    kept_states: int,
    target: Literal["cuda", "sm_90"],
) -> GroupPlan:
    """Plan groups that keep states of their parts."""
    size = plan_buffer_ints(max_reqs=len(kv_lens), num_workers=num_workers)
    plan = torch.full((size,), -7, dtype=torch.int32)
    host_plan(
        plan_buffer=plan,
        qo_indptr=qo_indptr,
        kv_lens=kv_lens,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim_qk=head_dim,
        head_dim_vo=head_dim,
        q_dtype=torch.bfloat16,
        kv_dtype=torch.bfloat16,
        causal=False,
        window_left=-1,
        num_workers=num_workers,
        split=0,
        many_rows_only=True,
        kept_states=kept_states,
        target=target,
    )
    costs, records = 2 * (len(kv_lens) + 1), 4 * (num_workers + 1)
    first = HEADER + 2 * costs
    starts, cuts = plan[first : first + 4 * records].view(2, 2, num_workers + 1, 4)[:, 1]
    return GroupPlan(int(plan[HAS_WORK + 1]), int(plan[NUM_PARTS]), starts, cuts)


def many_row_line(plan: torch.Tensor, num_requests: int, num_workers: int) -> list[torch.Tensor]:
    """Return the header of a plan, and the arrays of its many-row line."""
    costs, records = 2 * (num_requests + 1), 4 * (num_workers + 1)
    sizes = [HEADER, *[costs] * 2, *[records] * 6, *[num_workers + 1] * 2]
    header, *arrays = plan[: sum(sizes)].split(sizes)
    return [header, *arrays[1::2]]
