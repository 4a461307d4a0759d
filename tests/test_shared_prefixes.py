"""Steps whose requests share pages: what attention makes of them is what it makes of others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import fi_backend
from fi_backend import AttentionSpec, PagedAttention, PagedBatch, Plan, Workspace, shared_prefixes
from tests.kernels.shared_prefix_step import Branch, SharingStep, sharing_steps
from tests.reference import Mask, attention, torch_attention
from tests.tolerance import assert_accurate, assert_lse_accurate

SPEC = AttentionSpec(num_qo_heads=8, num_kv_heads=2, head_dim_qk=64, q_dtype=torch.bfloat16)
# Prefixes of 300 tokens and more in groups of 2 to 7 requests; some share nothing.
TREE = SharingStep(
    tree=(Branch(-1, 20), Branch(0, 9), Branch(-1, 31), Branch(2, 1)),
    nodes=(0, 2, 1, 0, -1, 3, 1, 2, 0, 2, 2, 1, -1),
    own_lens=(40, 7, 1, 100, 300, 5, 33, 16, 17, 90, 2, 64, 0),
    qo_lens=(1, 1, 1, 3, 1, 2, 1, 1, 9, 1, 1, 1, 1),
    page_size=16,
    table="block_table",
)


@pytest.fixture(autouse=True)
def _everything_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefixes, "MIN_TOKENS", 1)
    monkeypatch.setattr(shared_prefixes, "WORTH_KEYS", 1)
    monkeypatch.setattr(shared_prefixes, "FEWEST_REQUESTS", 2)


class Sharing:
    """A step with inputs on a device; what no request owns is NaN."""

    def __init__(self, step: SharingStep, spec: AttentionSpec, device: str) -> None:
        self.step, self.device = step, device
        self.spec = replace(spec, page_size=step.page_size)
        with torch.device("cpu"):
            lists, count = step.page_lists()
            shape = (count + 1, step.page_size, spec.num_kv_heads)
            self.k = torch.randn(*shape, spec.head_dim_qk).to(spec.kv_dtype)
            self.v = torch.randn(*shape, spec.head_dim_vo).to(spec.kv_dtype)
            self.lengths = step.lengths()
            lens = self.lengths["kv_lens"].tolist()
            if spec.kv_dtype.itemsize > 1:
                self._poison(lists, lens)
            self.keys, self.values = (
                [
                    cache.view(torch.uint8)[pages].view(cache.dtype).flatten(0, 1)[:length]
                    for pages, length in zip(lists, lens, strict=True)
                ]
                for cache in (self.k, self.v)
            )
            rows = int(self.lengths["qo_indptr"][-1])
            self.q = torch.randn(rows, spec.num_qo_heads, spec.head_dim_qk).to(spec.q_dtype)
            self.table = step.page_table()
        on_device = {k: v.to(device) for k, v in (self.lengths | self.table).items()}
        self.batch = PagedBatch(**on_device)

    def _poison(self, lists: list[list[int]], lens: list[int]) -> None:
        used = torch.zeros(self.k.shape[:2], dtype=torch.bool)
        for pages, length in zip(lists, lens, strict=True):
            for i, page in enumerate(pages):
                used[page, : max(0, length - i * self.step.page_size)] = True
        for cache in (self.k, self.v):
            cache[~used] = math.nan

    def plan(self, share: bool, **options: Any) -> Plan:
        workspace = options.pop("workspace", None) or Workspace(self.device)
        options = {"num_workers": 9} | options
        return fi_backend.plan(self.spec, self.batch, workspace, share_prefixes=share, **options)

    def run(self, plan: Plan, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = {
            name: x.to(self.device) if isinstance(x, torch.Tensor) else x
            for name, x in options.items()
        }
        caches = (self.k.to(self.device), self.v.to(self.device))
        layer = PagedAttention(self.spec, self.device)
        out, lse = layer.run(plan, self.q.to(self.device), caches, return_lse=True, **tensors)
        return out.cpu(), lse.cpu()

    def judge(self, out: torch.Tensor, lse: torch.Tensor, **scales: Any) -> None:
        """Check all rows against float64, one request at a time."""
        with torch.device("cpu"):
            self._judge(out, lse, **scales)

    def _judge(self, out: torch.Tensor, lse: torch.Tensor, **scales: Any) -> None:
        spec, row = self.spec, 0
        expected, yardstick, expected_lse = [], [], []
        sinks = scales.pop("sinks", None)
        mask = Mask(spec.causal, spec.window_left, spec.logits_soft_cap, sinks=sinks)
        for r, qo_len in enumerate(self.step.qo_lens):
            q, k, v = self.q[row : row + qo_len], self.keys[r], self.values[r]
            row += qo_len
            ref, ref_lse = attention(q, k, v, mask, sm_scale=spec.sm_scale, **scales)
            expected.append(ref)
            expected_lse.append(ref_lse)
            k, v = (
                (x.float() * scales.get(name, 1.0)).to(q.dtype)
                for x, name in ((k, "k_scale"), (v, "v_scale"))
            )
            yardstick.append(torch_attention(q, k, v, mask, sm_scale=spec.sm_scale))
        assert_accurate(out, torch.cat(expected), torch.cat(yardstick), str(self.step))
        assert_lse_accurate(lse, torch.cat(expected_lse))


def num_shared(plan: Plan) -> int:
    """Count the requests that share pages."""
    assert plan.shares is not None
    return int((plan.shares.groups.first_pages > 0).sum())


@given(step=sharing_steps())
@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_random_trees_of_prefixes(device: str, step: SharingStep) -> None:
    if len(step.nodes) < 2:
        return
    sharing = Sharing(step, SPEC, device)
    sharing.judge(*sharing.run(sharing.plan(share=True)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_tree(device: str, dtype: torch.dtype, head_dim: int) -> None:
    spec = replace(SPEC, q_dtype=dtype, kv_dtype=dtype, o_dtype=dtype, head_dim_qk=head_dim)
    spec = replace(spec, head_dim_vo=head_dim, sm_scale=head_dim**-0.5)
    sharing = Sharing(TREE, spec, device)
    plan = sharing.plan(share=True)
    assert num_shared(plan) == 10
    sharing.judge(*sharing.run(plan))


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"logits_soft_cap": 5.0}, {}),
        ({"sinks": True}, {"sinks": torch.linspace(-3.0, 6.0, 8)}),
        ({"causal": False}, {}),
        ({"window_left": 5000}, {}),
        ({"kv_dtype": torch.float8_e4m3fn}, {"k_scale": 0.5, "v_scale": 2.0}),
        ({}, {"k_scale": 0.25, "v_scale": 3.0}),
    ],
    ids=["soft cap", "sinks", "not causal", "wide window", "fp8", "scales"],
)
def test_what_a_layer_may_have(
    device: str, changes: dict[str, Any], options: dict[str, Any]
) -> None:
    sharing = Sharing(TREE, replace(SPEC, **changes), device)
    plan = sharing.plan(share=True)
    assert num_shared(plan) == 10
    sharing.judge(*sharing.run(plan, **options), **options)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_long_prefix_in_many_parts(device: str, num_rows: int) -> None:
    step = SharingStep(
        tree=(Branch(-1, 200), Branch(-1, 50)),
        nodes=(0, 1) * 6,
        own_lens=(40, 7, 1, 100, 300, 5, 33, 16, 17, 90, 2, 64),
        qo_lens=(num_rows,) * 12,
        page_size=16,
        table="block_table",
    )
    sharing = Sharing(step, replace(SPEC, sinks=True), device)
    plan = sharing.plan(share=True, num_workers=72)
    assert num_shared(plan) == 12
    assert plan.shares is not None
    if device == "cuda":  # the parts of the short prefix are fewer
        assert int(plan.shares.group_plan[19]) > 4
    sinks = torch.linspace(-3.0, 6.0, 8, device="cpu")
    sharing.judge(*sharing.run(plan, sinks=sinks), sinks=sinks)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_prefixes_behind_others(device: str, num_rows: int) -> None:
    """Two roots with two branches each, requests at roots, and a prefix without branches."""
    branches = [Branch(i % 2, 300 + i) for i in range(4)]
    step = SharingStep(
        tree=(Branch(-1, 70), Branch(-1, 90), *branches, Branch(-1, 50)),
        nodes=(2, 3, 4, 5, 6, 0, 1) * 4,
        own_lens=(40, 7, 3, 100, 300, 5, 33) * 4,
        qo_lens=(num_rows,) * 28,
        page_size=16,
        table="rows32",
    )
    sharing = Sharing(step, SPEC, device)
    plan = sharing.plan(share=True, num_workers=72)
    assert plan.shares is not None
    groups = plan.shares.groups
    assert groups.first_pages.tolist() == [370, 391, 372, 393, 50, 70, 90] * 4
    # Each row is in a group of each level: in one of the roots or of the prefix, and behind it.
    num_states = int(plan.shares.group_plan[19])
    assert groups.group_indptr[-1] == 2 * 28 * num_rows
    assert num_states % 2 == 0
    assert (num_states > 2) == (device == "cuda")
    sharing.judge(*sharing.run(plan))


def test_requests_of_which_a_window_hides_keys_share_none(device: str) -> None:
    sharing = Sharing(TREE, replace(SPEC, window_left=480), device)
    plan = sharing.plan(share=True)
    assert plan.shares is not None
    lens = sharing.lengths["kv_lens"]
    assert not plan.shares.groups.first_pages.cpu()[lens > 481].any()
    assert 0 < num_shared(plan) < 10
    sharing.judge(*sharing.run(plan))


@pytest.mark.parametrize("table", ["rows32", "rows64", "csr"])
def test_page_tables(device: str, table: str) -> None:
    sharing = Sharing(replace(TREE, table=table), SPEC, device)
    plan = sharing.plan(share=True)
    assert num_shared(plan) == 10
    sharing.judge(*sharing.run(plan))


def test_a_block_table_that_is_a_part_of_another(device: str) -> None:
    sharing = Sharing(TREE, SPEC, device)
    table = sharing.batch.block_table
    assert table is not None
    rows, width = table.shape
    wide = torch.full((rows + 3, width + 5), 1 << 30, dtype=torch.int32, device=device)
    part = wide[2 : 2 + rows, 3 : 3 + width]
    part.copy_(table)
    sharing.batch = replace(sharing.batch, block_table=part)
    plan = sharing.plan(share=True)
    assert num_shared(plan) == 10
    sharing.judge(*sharing.run(plan))


@pytest.mark.parametrize(("rows", "is_searched"), [(1 << 15, True), (1 << 16, False)])
def test_places_in_a_searched_table_fit_32_bits(rows: int, is_searched: bool) -> None:
    table = torch.empty((rows, 1 << 15), dtype=torch.int32, device="meta")
    lens = torch.empty(64, dtype=torch.int32, device="meta")
    batch = PagedBatch(torch.empty(65, dtype=torch.int32, device="meta"), lens, block_table=table)
    assert shared_prefixes.are_looked_for(batch) == is_searched


def test_bits_are_the_same_in_every_run(device: str) -> None:
    sharing = Sharing(TREE, SPEC, device)
    plan = sharing.plan(share=True)
    out, lse = sharing.run(plan)
    for _ in range(10):
        again = sharing.run(sharing.plan(share=True))
        assert torch.equal(again[0], out)
        assert torch.equal(again[1], lse)


def test_a_plan_serves_steps_of_other_sizes(device: str) -> None:
    workspace = Workspace(device)
    plan = Sharing(TREE, SPEC, device).plan(share=True, workspace=workspace)
    assert plan.shares is not None
    memory = plan.shares.capacity.own_lens.data_ptr()
    for count in (1, 7, 13):
        step = replace(
            TREE,
            nodes=TREE.nodes[:count],
            own_lens=TREE.own_lens[:count],
            qo_lens=TREE.qo_lens[:count],
        )
        sharing = Sharing(step, SPEC, device)
        plan = sharing.plan(share=True, workspace=workspace, into=plan)
        assert plan.shares is not None
        assert plan.shares.groups.own_lens.data_ptr() == memory
        sharing.judge(*sharing.run(plan))


def test_a_refilled_plan_keeps_its_memory_when_the_workspace_grows(device: str) -> None:
    workspace = Workspace(device)
    sharing = Sharing(TREE, SPEC, device)
    first = sharing.plan(share=True, workspace=workspace)
    larger = sharing.plan(share=True, workspace=workspace, num_workers=99)
    assert larger.partials.data_ptr() != first.partials.data_ptr()
    again = sharing.plan(share=True, workspace=workspace, into=first)

    def places(plan: Plan) -> list[int]:
        shares = plan.shares
        assert shares is not None
        memory = (plan.buffer, shares.partials, shares.group_plan, shares.prior_out)
        return [tensor.data_ptr() for tensor in memory]

    assert places(again) == places(first)
    sharing.judge(*sharing.run(again))


def test_an_operator_can_turn_it_on(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    sharing, workspace = Sharing(TREE, SPEC, device), Workspace(device)

    def looks(**options: Any) -> bool:
        made = fi_backend.plan(sharing.spec, sharing.batch, workspace, **options)
        assert (made.shares is None) == (not made.looks_for_shares)
        return made.looks_for_shares

    def needed() -> int:
        return fi_backend.workspace_bytes(sharing.spec, 64, 64, device=device)

    on_gpu = device == "cuda"
    assert not looks()
    assert looks(share_prefixes=True)
    before = needed()
    monkeypatch.setenv("FI_BACKEND_SHARED_PREFIX", "1")
    sharing.spec = replace(sharing.spec)
    assert looks() == on_gpu
    assert (needed() > before) == on_gpu
    assert not looks(share_prefixes=False)
    monkeypatch.setenv("FI_BACKEND_SHARED_PREFIX", "0")
    sharing.spec = replace(sharing.spec, share_prefixes=True)
    assert not looks()
    assert needed() == before


def test_a_layer_can_ask_for_it(device: str) -> None:
    sharing, on_gpu = Sharing(TREE, replace(SPEC, share_prefixes=True), device), device == "cuda"
    spec = sharing.spec
    plan = fi_backend.plan(spec, sharing.batch, Workspace(device), num_workers=9)
    assert plan.looks_for_shares == on_gpu
    without, needed = (
        fi_backend.workspace_bytes(layer, 64, 64, device=device)
        for layer in (replace(spec, share_prefixes=False), spec)
    )
    assert (without < needed) == on_gpu
    assert not replace(spec, alibi=True).geometry.shares_prefixes
    assert not replace(spec, batch_invariant=True).geometry.shares_prefixes
    sharing.judge(*sharing.run(plan))


@pytest.mark.parametrize(
    ("changes", "split_tokens"), [({"alibi": True}, 0), ({"custom_mask": True}, 0), ({}, 64)]
)
def test_where_positions_or_fixed_bits_matter_nothing_is_shared(
    changes: dict[str, Any], split_tokens: int
) -> None:
    sharing = Sharing(TREE, replace(SPEC, **changes), "cpu")
    assert not sharing.plan(share=True, split_tokens=split_tokens).looks_for_shares


def test_compiled_steps_share_too() -> None:
    sharing = Sharing(TREE, SPEC, "cpu")
    plan = sharing.plan(share=True)
    layer = PagedAttention(sharing.spec)
    run: Callable[[torch.Tensor], Any] = torch.compile(
        lambda q: layer.run(plan, q, (sharing.k, sharing.v)), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(run(sharing.q), sharing.run(plan)[0])


@pytest.mark.gpu
def test_a_captured_step_finds_other_groups() -> None:
    """Captured with a tree, replayed with other prefixes and lengths in the same memory."""
    steps = [
        TREE,
        replace(TREE, nodes=(3, 3, 0, 0, 1, 1, -1, -1, 2, 2, 3, 0, 1), seed=5),
        replace(TREE, nodes=(-1,) * 13, own_lens=(500,) * 13),
        replace(TREE, qo_lens=(0,) * 6 + (1,) * 7),
    ]
    rows, pages = 64, 1 + max(step.page_lists()[1] for step in steps)
    first = Sharing(TREE, SPEC, "cuda")
    width = 64
    table = torch.zeros(13, width, dtype=torch.int32, device="cuda")
    batch = PagedBatch(first.batch.qo_indptr, first.batch.kv_lens, block_table=table)
    q = torch.zeros(rows, 8, 64, dtype=torch.bfloat16, device="cuda")
    k = torch.zeros(pages, 16, 2, 64, dtype=torch.bfloat16, device="cuda")
    v, out = torch.zeros_like(k), torch.zeros_like(q)
    workspace, layer = Workspace("cuda"), PagedAttention(first.spec, "cuda")
    plan = fi_backend.plan(first.spec, batch, workspace, share_prefixes=True)

    def run() -> None:
        layer.run(fi_backend.plan(first.spec, batch, workspace, into=plan), q, (k, v), out=out)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for step in steps:
        sharing = Sharing(step, SPEC, "cuda")
        count = sharing.q.shape[0]
        batch.qo_indptr.copy_(sharing.batch.qo_indptr)
        batch.kv_lens.copy_(sharing.batch.kv_lens)
        table.fill_(1 << 30)
        given = sharing.table["block_table"][:13]
        table[:, : given.shape[1]] = given.cuda()
        q[:count] = sharing.q.cuda()
        k[: sharing.k.shape[0]] = sharing.k.cuda()
        v[: sharing.v.shape[0]] = sharing.v.cuda()
        graph.replay()
        expected, _ = sharing.run(sharing.plan(share=False))
        error = (out[:count].cpu().float() - expected.float()).abs().max()
        assert error <= 2 * torch.finfo(torch.bfloat16).eps * expected.float().abs().max()
