"""Steps to plan, for the tests of both planners."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from hypothesis import strategies as st

from fi_backend.kernels.host_plan import host_plan, plan_buffer_ints

# The plan begins with a header of so many ints (plan/work_line.h), with these places in it.
HEADER = 20
HAS_WORK = 16  # of each line
FEW_ROW_BLOCKS = 18


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
