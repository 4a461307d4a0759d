"""Levels of keys that a caller gives: one run over groups, one over own keys, float64's results."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from outer_level_step import Level, LevelCase, LevelStep, level_steps
from sync_debug import nothing_waits
from wrapper_cases import assert_out, assert_state, offsets, random_examples, workspace

import fi_backend as fi
from fi_backend.outer_levels import OuterLevels, OuterStates
from fi_backend.planning import max_prior_rows

# Two outer levels: three groups, the first two of which have a prefix in common; a request and a
# group without keys of their own.
DECODE = LevelStep(
    (
        Level((5, 4), (300, 70)),
        Level((2, 3, 4), (33, 0, 150)),
        Level((1,) * 9, (40, 7, 1, 100, 0, 5, 33, 16, 17)),
    ),
    page_size=16,
)


def cascade(num_levels: int, **options: Any) -> fi.MultiLevelCascadeAttentionWrapper:
    return fi.MultiLevelCascadeAttentionWrapper(num_levels, workspace(), **options)


def spec_of(case: LevelCase, **options: Any) -> fi.AttentionSpec:
    return fi.AttentionSpec(
        num_qo_heads=case.heads[0],
        num_kv_heads=case.heads[1],
        head_dim_qk=case.head_dim,
        q_dtype=case.q.dtype,
        kv_dtype=case.cache[0].dtype,
        page_size=case.step.page_size,
        **options,
    )


def count_runs(call: Any) -> tuple[Any, int]:
    before = fi.runtime_counters()["attention_runs"]
    return call(), fi.runtime_counters()["attention_runs"] - before


@random_examples
@given(step=level_steps())
def test_random_levels(device: str, step: LevelStep) -> None:
    assume(step.num_rows > 0)
    case = LevelCase(step)
    for causal in (False, True):
        wrapper = cascade(len(step.levels))
        case.plan(wrapper, causal=causal)
        assert wrapper._has_outer
        assert_out(wrapper.run(case.q, case.cache), case.expected(causal=causal)[0])


@pytest.mark.parametrize("num_outer", [1, 2])
@pytest.mark.usefixtures("device")
def test_levels_are_one_run_of_the_layer(num_outer: int) -> None:
    """That they are merged by it: one level after the other is a run each."""
    case = LevelCase(LevelStep(DECODE.levels[-1 - num_outer :], 16))
    options = dict(causal=True, sm_scale=0.2, logits_soft_cap=8.0)
    wrapper = cascade(num_outer + 1)
    case.plan(wrapper, **options)
    out, runs = count_runs(lambda: wrapper.run(case.q, case.cache))
    assert runs == 1
    assert_out(out, case.expected(**options)[0])


@pytest.mark.parametrize("num_outer", [1, 2])
def test_long_levels_have_many_parts(device: str, num_outer: int) -> None:
    levels = (Level((33,), (9000,)), Level((16, 17), (2500, 600)), Level((3,) * 11, (90,) * 11))
    case = LevelCase(LevelStep(levels[-1 - num_outer :], 16), heads=(8, 2))
    wrapper = cascade(num_outer + 1)
    case.plan(wrapper, causal=True)
    plan = wrapper._levels[-1]._plan
    assert plan is not None
    assert isinstance(plan.shares, OuterStates)
    num_states = int(plan.shares.prior_parts)
    assert num_states % num_outer == 0
    assert (num_states > num_outer) == (device == "cuda")
    assert_out(wrapper.run(case.q, case.cache), case.expected(causal=True)[0], 1e-4)


@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.usefixtures("device")
def test_heads_and_caches(head_dim: int, kv_dtype: torch.dtype | None) -> None:
    dtype = torch.bfloat16
    case = LevelCase(DECODE, dtype, dtype if kv_dtype is None else kv_dtype, head_dim=head_dim)
    wrapper = cascade(3)
    case.plan(wrapper)
    assert_out(wrapper.run(case.q, case.cache), case.expected()[0])


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (LevelStep((Level((40,), (50,)), Level((39, 1), (60, 3)))), "many rows"),
        (LevelStep((*[Level((3,), (9,))] * 3, Level((1,) * 3, (8, 4, 5)))), "many levels"),
        (LevelStep((Level((1, 2), (30, 9)),)), "one level"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.usefixtures("device")
def test_other_steps_run_one_level_after_the_other(step: LevelStep, why: str) -> None:
    case = LevelCase(step)
    wrapper = cascade(len(step.levels))
    case.plan(wrapper)
    out, runs = count_runs(lambda: wrapper.run(case.q, case.cache))
    assert runs == len(step.levels), why
    assert_out(out, case.expected()[0])


@pytest.mark.gpu
def test_rows_that_only_the_gpu_knows_run_one_level_after_the_other() -> None:
    with torch.device("cuda"):
        case = LevelCase(DECODE)
        wrapper = cascade(3)
        case.plan(wrapper, arguments=case.arguments("cuda"))
        out, runs = count_runs(lambda: wrapper.run(case.q, case.cache))
        assert runs == 3
        assert_out(out, case.expected()[0])


@pytest.mark.gpu
def test_no_step_waits_for_the_device() -> None:
    with torch.device("cuda"):
        case, wrapper = LevelCase(DECODE), cascade(3)
        arguments = case.arguments()
        for mode in (contextlib.nullcontext, nothing_waits):
            with mode():
                case.plan(wrapper, arguments=arguments, causal=True)
                out = wrapper.run(case.q, case.cache)
        assert_out(out, case.expected(causal=True)[0])


@pytest.mark.usefixtures("device")
def test_a_wrapper_changes_with_its_steps() -> None:
    """One plan after the other, of other shapes, or of many rows."""
    wrapper = cascade(2)
    shapes = ([1] * 9, [1] * 20, [4, 40, 1], [2] * 5, [1] * 20)
    for qo_lens in shapes:
        keys = (sum(qo_lens), tuple(range(3, 3 + len(qo_lens))))
        levels = (Level((keys[0],), (100,)), Level(tuple(qo_lens), keys[1]))
        case = LevelCase(LevelStep(levels))
        case.plan(wrapper, causal=True)
        assert wrapper._has_outer == (max(qo_lens) <= 4)
        assert_out(wrapper.run(case.q, case.cache), case.expected(causal=True)[0])


@pytest.mark.usefixtures("device")
def test_a_wrapper_leaves_inference_mode() -> None:
    case, wrapper = LevelCase(DECODE), cascade(3)
    with torch.inference_mode():
        case.plan(wrapper)
        first = wrapper.run(case.q, case.cache).clone()
    case.plan(wrapper)
    assert wrapper._has_outer
    assert torch.equal(wrapper.run(case.q, case.cache), first)


def test_a_step_that_is_planned_again_keeps_its_memory(device: str) -> None:
    case, space = LevelCase(DECODE), fi.Workspace(device)
    *outer, batch = case.batches()
    options: dict[str, Any] = dict(outer=OuterLevels(tuple(outer), 9), share_prefixes=True)
    first = fi.plan(spec_of(case), batch, space, **options)
    again = fi.plan(spec_of(case), batch, space, into=first, **options)
    assert first.shares is not None
    assert again.shares is not None
    assert again.shares.group_plan is first.shares.group_plan


def test_a_layer_that_is_not_served_has_no_rows_behind_levels(device: str) -> None:
    spec = replace(spec_of(LevelCase(DECODE)), head_dim_qk=1000)
    assert max_prior_rows(spec, device) == 0
    assert fi.supports(spec, device) is not None


def graph_wrapper(step: LevelStep, pages: int = 100) -> fi.MultiLevelCascadeAttentionWrapper:
    def zeros(sizes: list[int]) -> list[torch.Tensor]:
        return [torch.zeros(size, dtype=torch.int32) for size in sizes]

    groups = [len(level.qo_lens) for level in step.levels]
    return cascade(
        len(groups),
        use_cuda_graph=True,
        qo_indptr_buf_arr=zeros([n + 1 for n in groups]),
        paged_kv_indptr_buf_arr=zeros([n + 1 for n in groups]),
        paged_kv_indices_buf_arr=zeros([pages] * len(groups)),
        paged_kv_last_page_len_buf_arr=zeros(groups),
    )


# What is captured, then other rows and keys of as many groups.
GRAPH_STEPS = (
    DECODE,
    LevelStep(
        (
            Level((9, 0), (700, 10)),
            Level((1, 7, 1), (5, 64, 1)),
            Level((1, 1, 1, 0, 2, 1, 1, 1, 1), (3, 90, 16, 0, 8, 2, 9, 300, 1)),
        ),
        page_size=16,
    ),
    LevelStep(
        (Level((0, 4), (9, 9)), Level((4, 0, 0), (0, 3, 3)), Level((4, *[0] * 8), (30, *[0] * 8))),
        page_size=16,
    ),
)


def test_a_captured_run_follows_every_plan(device: str) -> None:
    wrapper = graph_wrapper(DECODE)
    cases = [LevelCase(step) for step in GRAPH_STEPS]
    size = max(case.cache[0].shape[0] for case in cases)
    pool = tuple(torch.empty(size, *x.shape[1:], dtype=x.dtype) for x in cases[0].cache)
    q = torch.empty_like(cases[0].q)

    def load(case: LevelCase) -> None:
        for into, cache in zip(pool, case.cache, strict=True):
            into[: cache.shape[0]] = cache
        q[: len(case.q)] = case.q
        case.plan(wrapper, causal=True)

    load(cases[0])
    out = wrapper.run(q, pool)
    graph = None
    if device == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = wrapper.run(q, pool)
    for case in (*cases, cases[0]):
        load(case)
        rows = len(case.q)
        if graph is not None:
            graph.replay()
        else:
            out = wrapper.run(q[:rows], pool)
        assert_out(out[:rows], case.expected(causal=True)[0])


def test_a_fixed_wrapper_refuses_what_its_first_plan_excludes(device: str) -> None:
    wrapper = graph_wrapper(DECODE)
    case = LevelCase(DECODE)
    case.plan(wrapper)
    levels = (*DECODE.levels[:2], Level((9, *[0] * 8), (9,) * 9))
    most = max_prior_rows(spec_of(case), device)
    with pytest.raises(ValueError, match=rf"a request at most {most} rows.*got 9"):
        LevelCase(replace(DECODE, levels=levels)).plan(wrapper)
    assert_out(wrapper.run(case.q, case.cache), case.expected()[0])


def test_the_core_takes_levels(device: str) -> None:
    case = LevelCase(DECODE)
    *outer, batch = case.batches()
    spec = spec_of(case, causal=True, sinks=True, logits_soft_cap=9.0)
    sinks = torch.linspace(-3.0, 6.0, case.heads[0])
    levels = OuterLevels(tuple(outer), DECODE.num_rows)
    space, plan = fi.Workspace(device), None
    for _ in range(2):
        plan = fi.plan(spec, batch, space, into=plan, outer=levels)
        got = fi.PagedAttention(spec, device).run(
            plan, case.q, case.cache, return_lse=True, sinks=sinks, v_scale=2.0
        )
        out, lse = case.expected(causal=True, sinks=sinks, logits_soft_cap=9.0)
        assert_state(got, (2 * out, lse))


@pytest.mark.usefixtures("device")
def test_pages_of_all_levels_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    case = LevelCase(DECODE)
    case.tables[1].indices[3] = len(case.cache[0])
    monkeypatch.setenv("FI_BACKEND_CHECKED", "1")
    wrapper = cascade(3)
    case.plan(wrapper)
    with pytest.raises(ValueError, match=r"page_indices"):
        wrapper.run(case.q, case.cache)


def test_a_plan_with_levels_refuses(device: str) -> None:
    case = LevelCase(DECODE)
    *outer, batch = case.batches()
    levels, spec = OuterLevels(tuple(outer), 9), spec_of(case)
    space = fi.Workspace(device)
    with pytest.raises(ValueError, match="split_tokens must be 0 with outer; got 64"):
        fi.plan(spec, batch, space, outer=levels, split_tokens=64)
    with pytest.raises(ValueError, match="outer must be None where logits depend on positions"):
        fi.plan(replace(spec, window_left=9), batch, space, outer=levels)
    none = offsets(())
    empty = replace(outer[0], qo_indptr=none, kv_lens=none[:0], page_indptr=none)
    with pytest.raises(ValueError, match="levels must have a request"):
        fi.plan(spec, batch, space, outer=OuterLevels((empty, empty), 9))
    with pytest.raises(ValueError, match="levels must be 1 to 2 batches; got 0"):
        fi.plan(spec, batch, space, outer=OuterLevels((), 9))
    if device == "cuda":
        unknown = replace(batch, max_qo_len=None)
        with pytest.raises(ValueError, match="must be at most 8 on a GPU; got None"):
            fi.plan(spec, unknown, space, outer=levels)
        return
    with pytest.raises(ValueError, match=r"at most 8; got qo_indptr\[-1\] \[9, 9, 9\]"):
        fi.plan(spec, batch, space, outer=OuterLevels(tuple(outer), 8))
    bad = replace(outer[0], kv_lens=-outer[0].kv_lens)
    with pytest.raises(ValueError, match="kv_lens"):
        fi.plan(spec, batch, space, outer=OuterLevels((bad,), 9))
