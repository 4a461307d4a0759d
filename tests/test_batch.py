"""PagedBatch: the page-table forms, and that bad metadata is refused before a kernel sees it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fi_backend import AttentionSpec, PagedBatch, Plan, Workspace, plan

WORKSPACE = Workspace()


def i32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_plan(batch: PagedBatch, page_size: int, into: Plan | None = None) -> Plan:
    return plan(
        AttentionSpec(
            num_qo_heads=2,
            num_kv_heads=1,
            head_dim_qk=64,
            q_dtype=torch.float32,
            page_size=page_size,
        ),
        batch,
        WORKSPACE,
        into=into,
    )


def test_lengths_follow_from_flashinfers_table() -> None:
    batch = PagedBatch.from_csr(i32(0, 1, 2, 3), i32(0, 2, 2, 3), i32(7, 3, 5), i32(3, 0, 4), 4)
    assert batch.kv_lens.tolist() == [7, 0, 4]
    make_plan(batch, page_size=4)


def test_lengths_follow_from_ragged_offsets() -> None:
    batch = PagedBatch.ragged(i32(0, 2, 2), i32(0, 5, 9))
    assert batch.kv_lens.tolist() == [5, 4]
    assert batch.page_indices is None
    make_plan(batch, page_size=1)


def test_an_empty_batch_is_legal() -> None:
    batch = PagedBatch(i32(0), i32(), block_table=torch.zeros((0, 4), dtype=torch.int32))
    make_plan(batch, page_size=16)


GOOD: dict[str, Any] = {
    "qo_indptr": i32(0, 1, 3),
    "kv_lens": i32(5, 8),
    "block_table": torch.zeros((2, 2), dtype=torch.int32),
}
CSR: dict[str, Any] = {
    "qo_indptr": i32(0, 1, 3),
    "kv_lens": i32(5, 8),
    "page_indptr": i32(0, 2, 4),
    "page_indices": i32(0, 1, 2, 3),
}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            GOOD | {"qo_indptr": i32(0, 3, 1)},
            ValueError,
            r"qo_indptr\[1\] = 3 .*qo_indptr\[2\] = 1",
        ),
        (GOOD | {"qo_indptr": i32(-1, 1, 3)}, ValueError, r"qo_indptr\[0\] .*-1"),
        (GOOD | {"qo_indptr": i32(2, 3, 5)}, ValueError, r"qo_indptr\[0\] must be 0; got 2"),
        (GOOD | {"qo_indptr": i32(0, 3)}, ValueError, r"qo_indptr must have shape \[3\]"),
        (GOOD | {"qo_indptr": GOOD["qo_indptr"].long()}, TypeError, "qo_indptr .*int32.*int64"),
        (GOOD | {"kv_lens": i32(-1, 8)}, ValueError, r"kv_lens\[0\] = -1"),
        (GOOD | {"kv_lens": i32(5, 9)}, ValueError, r"at most 8.*kv_lens\[1\] = 9"),
        (GOOD | {"kv_lens": [5, 8]}, TypeError, "kv_lens must be a torch.Tensor; got list"),
        (GOOD | {"block_table": torch.zeros(2, 2)}, TypeError, "block_table .*float32"),
        (GOOD | {"block_table": i32(1, 2)}, ValueError, r"block_table must have shape \[\*, \*\]"),
        (GOOD | {"block_table": GOOD["block_table"][:1]}, ValueError, "2 requests; got 1"),
        (GOOD | {"request_rows": i32(0, 2)}, ValueError, r"rows in \[0, 2\)"),
        (GOOD | {"page_indptr": i32(0, 1, 2)}, ValueError, "not both"),
        (CSR | {"page_indptr": None, "page_indices": None}, ValueError, "got neither"),
        (CSR | {"page_indptr": i32(0, 2, 1)}, ValueError, r"page_indptr\[2\] = 1"),
        (CSR | {"page_indptr": i32(0, 2, 5)}, ValueError, "page_indices must have at least .*5"),
        (CSR | {"page_indices": None}, ValueError, "page_size must be 1 .*got 4"),
        (CSR | {"kv_lens": i32(5, 9)}, ValueError, r"kv_lens\[1\] must be at most 8"),
        (GOOD | {"max_qo_len": -1}, ValueError, "max_qo_len must be at least 0 .*-1"),
        (GOOD | {"max_qo_len": 1}, ValueError, "max_qo_len .* got 1, and request 1 has 2"),
    ],
)
def test_bad_metadata_is_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    make_plan(PagedBatch(**GOOD), page_size=4)
    good = make_plan(PagedBatch(**CSR), page_size=4)
    for into in (None, good):
        with pytest.raises(error, match=message):
            make_plan(PagedBatch(**arguments), page_size=4, into=into)
