"""Steps whose rows attend to levels of keys that groups of them have in common."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from reference import Mask, attention
from wrapper_cases import Case, PagedTable, int32, make_case, offsets

import fi_backend as fi


@dataclass(frozen=True)
class Level:
    """Groups of query rows, one after the other, and the keys of each."""

    qo_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]


@dataclass(frozen=True)
class LevelStep:
    """Levels from the outermost to the requests' own."""

    levels: tuple[Level, ...]
    page_size: int = 4

    @property
    def num_rows(self) -> int:
        return sum(self.levels[-1].qo_lens)


@st.composite
def level_steps(draw: st.DrawFn, most_rows: int = 4) -> LevelStep:
    """One or two outer levels; groups may lack rows or keys, and end inside of a request."""
    count = draw(st.integers(1, 6))
    qo_lens = draw(st.lists(st.integers(0, most_rows), min_size=count, max_size=count))
    rows = sum(qo_lens)
    levels = []
    for _ in range(draw(st.integers(1, 2))):
        ends = sorted(draw(st.lists(st.integers(0, rows), max_size=4)))
        bounds = [0, *ends, rows]
        lens = [b - a for a, b in itertools.pairwise(bounds)]
        keys = draw(st.lists(st.integers(0, 40), min_size=len(lens), max_size=len(lens)))
        levels.append(Level(tuple(lens), tuple(keys)))
    own = draw(st.lists(st.integers(0, 30), min_size=count, max_size=count))
    levels.append(Level(tuple(qo_lens), tuple(own)))
    return LevelStep(tuple(levels), draw(st.sampled_from([1, 4, 16])))


@dataclass
class LevelCase:
    """Tensors of a step: a cache that all levels share, and a table for each."""

    step: LevelStep
    dtype: torch.dtype | None = None
    kv_dtype: torch.dtype | None = None
    heads: tuple[int, int] = (8, 2)
    head_dim: int = 64
    cases: list[Case] = field(init=False)
    tables: list[PagedTable] = field(init=False)
    cache: tuple[torch.Tensor, torch.Tensor] = field(init=False)
    q: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.cases = [
            make_case(
                level.qo_lens,
                level.kv_lens,
                heads=self.heads,
                head_dim=self.head_dim,
                dtype=self.dtype,
                kv_dtype=self.kv_dtype,
            )
            for level in self.step.levels
        ]
        self.q = self.cases[-1].rows
        caches, self.tables, before = [], [], 0
        for case in self.cases:
            table = case.paged(self.step.page_size)
            caches.append(table.cache)
            indices = table.indices[: int(table.indptr[-1])] + before
            self.tables.append(PagedTable(None, table.indptr, indices, table.last_page_len))
            before += table.cache[0].shape[0]
        k, v = (
            torch.cat([c.view(torch.uint8) if c.dtype.itemsize == 1 else c for c in both])
            for both in zip(*caches, strict=True)
        )
        self.cache = (k.view(caches[0][0].dtype), v.view(caches[0][1].dtype))

    def arguments(self, metadata: str = "cpu") -> tuple[list[torch.Tensor], ...]:
        """Return the first four arguments of the wrapper's plan()."""
        tables = [table.to(metadata) for table in self.tables]
        return (
            [offsets(level.qo_lens).to(metadata) for level in self.step.levels],
            [table.indptr for table in tables],
            [table.indices for table in tables],
            [table.last_page_len for table in tables],
        )

    def plan(
        self,
        wrapper: fi.MultiLevelCascadeAttentionWrapper,
        arguments: tuple[list[torch.Tensor], ...] | None = None,
        **options: Any,
    ) -> None:
        """Plan with the arguments at hand, else with those on the host."""
        wrapper.plan(
            *(arguments or self.arguments()),
            *self.heads,
            self.head_dim,
            self.step.page_size,
            q_data_type=self.q.dtype,
            kv_data_type=self.cache[0].dtype,
            **options,
        )

    def batches(self) -> list[fi.PagedBatch]:
        """Return the levels as the core takes them, on the default device."""
        return [
            fi.PagedBatch(
                offsets(level.qo_lens),
                int32(level.kv_lens),
                page_indptr=table.indptr,
                page_indices=table.indices,
                max_qo_len=max(level.qo_lens),
            )
            for level, table in zip(self.step.levels, self.tables, strict=True)
        ]

    def expected(
        self, *, causal: bool = False, sm_scale: float | None = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and base-2 lse of every row, in float64."""
        *outer, own = zip(self.step.levels, self.cases, strict=True)
        scale = self.head_dim**-0.5 if sm_scale is None else sm_scale
        outs, lses, row = [self.q[:0].double()], [self.q[:0, :, 0].double()], 0
        for qo_len, k, v in zip(own[0].qo_lens, own[1].k, own[1].v, strict=True):
            for i in range(qo_len):
                end = max(0, len(k) - qo_len + i + 1) if causal else len(k)
                keys, values = [k[:end]], [v[:end]]
                for level, case in outer:
                    group = group_of(level, row)
                    keys.append(case.k[group])
                    values.append(case.v[group])
                mask = Mask(False, **options)
                q = self.q[row : row + 1]
                out, lse = attention(q, torch.cat(keys), torch.cat(values), mask, sm_scale=scale)
                outs.append(out)
                lses.append(lse)
                row += 1
        return torch.cat(outs), torch.cat(lses)


def group_of(level: Level, row: int) -> int:
    """Find the group of a row."""
    end = 0
    for group, count in enumerate(level.qo_lens):
        end += count
        if row < end:
            return group
    raise AssertionError(f"{level} has no row {row}")
