"""The core on a GPU: values, no synchronisation or allocation, and CUDA graphs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from sync_debug import nothing_waits
from test_attention import Case, check_values, make_case

import fi_backend
from fi_backend import AttentionSpec, PagedAttention, PagedBatch, Plan, Workspace

pytestmark = pytest.mark.gpu

SPEC = AttentionSpec(
    num_qo_heads=8, num_kv_heads=2, head_dim_qk=64, q_dtype=torch.bfloat16, page_size=16
)
Cache = tuple[torch.Tensor, torch.Tensor]


def to_gpu(case: Case) -> tuple[torch.Tensor, Cache, PagedBatch]:
    k, v = case.kv
    table = case.batch.block_table
    assert table is not None
    batch = PagedBatch(
        case.batch.qo_indptr.cuda(), case.batch.kv_lens.cuda(), block_table=table.cuda()
    )
    return case.q.cuda(), (k.cuda(), v.cuda()), batch


@pytest.mark.parametrize("split_tokens", [0, -1, 64])
@pytest.mark.parametrize("num_workers", [1, 3, None])
def test_a_mixed_batch_matches_the_reference(split_tokens: int, num_workers: int | None) -> None:
    case = make_case(SPEC)
    q, kv, batch = to_gpu(case)
    plan = fi_backend.plan(
        SPEC, batch, Workspace("cuda"), num_workers=num_workers, split_tokens=split_tokens
    )
    out, lse = PagedAttention(SPEC, "cuda").run(plan, q, kv, return_lse=True)
    check_values(case, SPEC, out.cpu())
    assert not lse.isnan().any()


def test_workspace_is_bounded_by_what_is_announced() -> None:
    _, _, batch = to_gpu(make_case(SPEC))
    workspace = Workspace("cuda")
    plan = fi_backend.plan(SPEC, batch, workspace)
    used = workspace.num_bytes + 4 * plan.buffer.numel()
    assert used <= fi_backend.workspace_bytes(SPEC, batch.num_requests, 1 << 20, device="cuda")


def test_a_step_neither_waits_nor_allocates() -> None:
    q, kv, batch = to_gpu(make_case(SPEC))
    workspace, layer = Workspace("cuda"), PagedAttention(SPEC, "cuda")
    out = torch.empty_like(q)
    plan = fi_backend.plan(SPEC, batch, workspace)
    layer.run(plan, q, kv, out=out)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with nothing_waits():
        for _ in range(3):
            plan = fi_backend.plan(SPEC, batch, workspace, into=plan)
            layer.run(plan, q, kv, out=out)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def step(q: torch.Tensor, kv: Cache, batch: PagedBatch, plan: Plan, out: torch.Tensor) -> None:
    fresh = fi_backend.plan(SPEC, batch, Workspace("cuda", buffer=plan.partials), into=plan)
    PagedAttention(SPEC, "cuda").run(fresh, q, kv, out=out)


def test_a_captured_step_plans_anew_for_other_lengths_and_pages() -> None:
    """Captured for 5 requests and 79 rows; replayed with fewer, shorter and moved ones."""
    q, kv, batch = to_gpu(make_case(SPEC))
    assert batch.block_table is not None
    plan = fi_backend.plan(SPEC, batch, Workspace("cuda"))
    out = torch.zeros_like(q)
    step(q, kv, batch, plan, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(q, kv, batch, plan, out)
    original = [t.clone() for t in (batch.qo_indptr, batch.kv_lens, batch.block_table)]
    for qo_lens, kv_lens in (
        ((1, 1, 1, 1, 1), (130, 7, 90, 3, 0)),
        ((70, 0, 0, 0, 0), (130, 0, 0, 0, 0)),
        ((0, 0, 0, 0, 0), (0, 0, 0, 0, 0)),
        ((1, 5, 60, 3, 4), (100, 6, 88, 3, 0)),
    ):
        batch.qo_indptr[1:] = torch.tensor(qo_lens).cumsum(0).cuda()
        batch.kv_lens.copy_(torch.tensor(kv_lens))
        out.fill_(7.0)
        graph.replay()
        eager = torch.full_like(out, 7.0)
        other = fi_backend.plan(SPEC, batch, Workspace("cuda"))
        PagedAttention(SPEC, "cuda").run(other, q, kv, out=eager)
        assert torch.equal(out, eager)
        assert (out[sum(qo_lens) :] == 7.0).all()
        if sum(qo_lens):
            assert (out[: sum(qo_lens)] != 7.0).any()
    for tensor, values in zip(
        (batch.qo_indptr, batch.kv_lens, batch.block_table), original, strict=True
    ):
        tensor.copy_(values)
    graph.replay()
    plan_again = fi_backend.plan(SPEC, batch, Workspace("cuda"))
    assert torch.equal(out, PagedAttention(SPEC, "cuda").run(plan_again, q, kv))


def test_a_run_counts_when_it_is_launched_or_captured() -> None:
    q, kv, batch = to_gpu(make_case(SPEC))
    plan, layer = fi_backend.plan(SPEC, batch, Workspace("cuda")), PagedAttention(SPEC, "cuda")
    out = torch.empty_like(q)

    def runs() -> int:
        return fi_backend.runtime_counters()["attention_runs"]

    before = runs()
    for _ in range(3):
        layer.run(plan, q, kv, out=out)
    assert runs() == before + 3
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.run(plan, q, kv, out=out)
    graph.replay()
    assert runs() == before + 4


def test_bad_arguments_are_named() -> None:
    q, (k, v), batch = to_gpu(make_case(SPEC))
    plan = fi_backend.plan(SPEC, batch, Workspace("cuda"))
    layer = PagedAttention(SPEC, "cuda")
    with pytest.raises(ValueError, match=r"q must have shape \[\*, 8, 64\]"):
        layer.run(plan, q[:, :4], (k, v))
    with pytest.raises(ValueError, match="q must be on device cuda:0"):
        layer.run(plan, q.cpu(), (k, v))
    with pytest.raises(ValueError, match=r"k must have shape \[\*, 16, 2, 64\]"):
        layer.run(plan, q, (k[:, :, :1], v[:, :, :1]))
    with pytest.raises(ValueError, match="workspace must be on"):
        fi_backend.plan(SPEC, batch, Workspace())
    cpu_lens = dataclasses.replace(batch, kv_lens=batch.kv_lens.cpu())
    with pytest.raises(ValueError, match="kv_lens must be on device cuda:0"):
        fi_backend.plan(SPEC, cpu_lens, Workspace("cuda"))
