"""Builder and layers on vLLM's own metadata classes: values, windows per layer, dry runs."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference import Mask, attention

from fi_backend.errors import UnsupportedError
from tests.integrations.vllm_step import (
    DIM,
    DTYPE,
    HEADS,
    KV_HEADS,
    LAYER,
    PAGE,
    REQUESTS,
    SCALE,
    Load,
    check,
    make_builder,
    make_impl,
    make_step,
    run,
)

SLOPES = [0.5**n for n in range(1, HEADS + 1)]
VARIANTS = {
    "plain": ({}, {}),
    "window": ({"sliding_window": 24}, {"window_left": 23}),
    "soft cap": ({"logits_soft_cap": 5.0}, {"logits_soft_cap": 5.0}),
    "alibi": ({"alibi_slopes": SLOPES}, {"alibi_slopes": torch.tensor(SLOPES)}),
    "sinks": ({"sinks": torch.arange(HEADS) / 2}, {"sinks": torch.arange(HEADS) / 2}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_equals_reference(variant: str, vllm: Load) -> None:
    arguments, mask = VARIANTS[variant]
    step, impl = make_step(vllm), make_impl(**arguments)
    metadata = make_builder(vllm, {"layer": impl}).build(0, step.common)
    check(step, run(step, impl, metadata), Mask(causal=True, **mask))


def test_layers_of_one_group_keep_their_windows(vllm: Load) -> None:
    """With the hybrid cache manager off, one group mixes windowed and full layers."""
    step = make_step(vllm)
    impls = {"a": make_impl(), "b": make_impl(sliding_window=8), "c": make_impl(sliding_window=8)}
    metadata = make_builder(vllm, impls).build(0, step.common)
    assert len(metadata.plans) == 2
    plans = dict(metadata.plans)
    for impl, window_left in zip(impls.values(), (-1, 7, 7), strict=True):
        check(step, run(step, impl, metadata), Mask(causal=True, window_left=window_left))
    assert metadata.plans == plans


def test_batch_invariant_mode_reaches_plan_and_kernels(
    vllm: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits are tests/test_batch_invariant.py's business."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    step, impl = make_step(vllm), make_impl()
    metadata = make_builder(vllm, {"layer": impl}).build(0, step.common)
    check(step, run(step, impl, metadata), Mask(causal=True))
    assert [plan.geometry.batch_invariant for plan in metadata.plans.values()] == [True]


def test_unknown_layers_plan_on_first_use(vllm: Load) -> None:
    step, impl = make_step(vllm), make_impl()
    metadata = make_builder(vllm, {}).build(common_prefix_len=0, common_attn_metadata=step.common)
    assert metadata.plans == {}
    check(step, run(step, impl, metadata), Mask(causal=True))
    assert len(metadata.plans) == 1


def test_layer_that_reads_another_layers_cache(vllm: Load) -> None:
    step, owner = make_step(vllm), make_impl()
    reader = make_impl(kv_sharing_target_layer_name="owner")
    metadata = make_builder(vllm, {"owner": owner, "reader": reader}).build(0, step.common)
    run(step, owner, metadata)
    output = torch.empty(step.q.shape[0], HEADS, DIM)
    reader.forward(LAYER, step.q, None, None, step.cache, metadata, output=output)
    check(step, output, Mask(causal=True))


def test_new_cache_tensor_is_noticed(vllm: Load) -> None:
    step, impl = make_step(vllm), make_impl()
    metadata = make_builder(vllm, {"layer": impl}).build(0, step.common)
    run(step, impl, metadata)
    other = make_step(vllm)
    metadata = make_builder(vllm, {"layer": impl}).build(0, other.common)
    check(other, run(other, impl, metadata), Mask(causal=True))


def test_dry_run_writes_zeros_and_touches_no_cache() -> None:
    impl = make_impl()
    output = torch.ones(4, HEADS, DIM)
    q = torch.randn(4, HEADS, DIM)
    impl.do_kv_cache_update(
        LAYER, q[:, :KV_HEADS], q[:, :KV_HEADS], torch.tensor([]), torch.tensor([-1] * 4)
    )
    impl.forward(LAYER, q, None, None, torch.tensor([]), None, output=output)
    assert not output.any()


def test_step_without_tokens(vllm: Load) -> None:
    step, impl = make_step(vllm), make_impl()
    common = step.common.replace(
        query_start_loc=torch.zeros(1, dtype=torch.int32),
        seq_lens=torch.zeros(0, dtype=torch.int32),
        block_table_tensor=torch.zeros(0, 4, dtype=torch.int32),
        slot_mapping=torch.zeros(0, dtype=torch.int64),
        num_reqs=0,
        num_actual_tokens=0,
    )
    step.common = common
    metadata = make_builder(vllm, {"layer": impl}).build(0, common)
    run(step, impl, metadata)


def test_encoder_only_attends_to_the_step_itself(vllm: Load) -> None:
    """No cache: every token of a request sees every other."""
    step = make_step(vllm)
    impl = make_impl(attn_type="encoder_only")
    spec = vllm("v1.kv_cache_interface").EncoderOnlyAttentionSpec(
        block_size=PAGE, num_kv_heads=KV_HEADS, head_size=DIM, dtype=DTYPE
    )
    lengths = step.common.query_start_loc.diff()
    common = step.common.replace(causal=False, seq_lens=lengths)
    metadata = make_builder(vllm, {"layer": impl}, spec).build(0, common)
    assert metadata.batch.kv_lens is common.seq_lens  # CUDA graphs keep addresses
    output = torch.empty(step.q.shape[0], HEADS, DIM)
    impl.forward(LAYER, step.q, step.k, step.v, torch.tensor([]), metadata, output=output)
    for request, (tokens, _) in enumerate(REQUESTS):
        if tokens:
            mine = step.tokens(request)
            want, _ = attention(step.q[mine], step.k[mine], step.v[mine], Mask(), sm_scale=SCALE)
            torch.testing.assert_close(output[mine].double(), want, atol=2e-5, rtol=2e-5)


def test_encoder_window_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="sliding_window must be None"):
        make_impl(attn_type="encoder_only", sliding_window=8)


def test_causality_per_request_is_refused(vllm: Load) -> None:
    step = make_step(vllm)
    step.common.causal = torch.ones(len(REQUESTS), dtype=torch.bool)
    with pytest.raises(UnsupportedError, match="causal for some requests only"):
        make_builder(vllm, {}).build(0, step.common)


def test_fused_output_quantisation_is_refused(vllm: Load) -> None:
    step, impl = make_step(vllm), make_impl()
    metadata = make_builder(vllm, {"layer": impl}).build(0, step.common)
    with pytest.raises(UnsupportedError, match="output_scale"):
        impl.forward(
            LAYER,
            step.q,
            step.k,
            step.v,
            step.cache,
            metadata,
            output=torch.empty(step.q.shape[0], HEADS, DIM),
            output_scale=torch.ones(1),
        )


def test_counters_count_layers_times_steps(vllm: Load) -> None:
    from fi_backend.integrations.vllm.worker_extension import WorkerExtension

    step = make_step(vllm)
    impls = {"a": make_impl(), "b": make_impl(sliding_window=8)}
    builder = make_builder(vllm, impls)
    before = WorkerExtension().fi_backend_counters()
    for _ in range(3):
        metadata = builder.build(0, step.common)
        for impl in impls.values():
            run(step, impl, metadata)
    after = WorkerExtension().fi_backend_counters()
    grown = {name: after[name] - before[name] for name in after}
    assert grown == {"attention_runs": 6, "group_steps": 3, "layer_steps": 6, "layer_calls": 6}


def test_steps_plan_into_the_same_memory(vllm: Load) -> None:
    """A CUDA graph keeps addresses: those of a builder's plans never change."""
    step, impls = make_step(vllm), {"a": make_impl(), "b": make_impl(sliding_window=8)}
    builder = make_builder(vllm, impls)

    def addresses() -> list[tuple[int, int]]:
        plans = builder.build(0, step.common).plans.values()
        return [(plan.buffer.data_ptr(), plan.partials.data_ptr()) for plan in plans]

    first = addresses()
    assert len({buffer for buffer, _ in first}) == 2
    # A builder made later, for wider heads, needs more scratch.
    wide = vllm("v1.kv_cache_interface").FullAttentionSpec(
        block_size=PAGE, num_kv_heads=1, head_size=256, dtype=DTYPE
    )
    from fi_backend.integrations.vllm.impl import FIAttentionImpl

    later = make_builder(vllm, {"wide": FIAttentionImpl(2, 256, SCALE, 1)}, wide)
    assert addresses() == first
    assert later.build(0, step.common).plans


def test_the_first_builder_compiles_for_every_group_at_once(
    vllm: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fi_backend.integrations.vllm.impl import FIAttentionImpl

    builds: list[Any] = []
    monkeypatch.setattr("fi_backend.warmup.build", builds.append)
    other = {"other": FIAttentionImpl(2, 128, SCALE, 1)}
    make_builder(vllm, {"layer": make_impl()}, other_groups=other)
    (specs,) = builds
    names = sorted(spec.name.removesuffix("_cpu") for spec in specs)
    types = "cpu_f32_f32_f32"
    assert names == [
        "append",
        f"decode_{types}_d128x128",
        f"decode_{types}_d64x64",
        "plan",
        f"prefill_{types}_d128x128",
        f"prefill_{types}_d64x64",
    ]


def test_more_requests_than_reserved_are_served(vllm: Load) -> None:
    """Chunked local attention makes several requests of one."""
    step, impl = make_step(vllm), make_impl()
    metadata = make_builder(vllm, {"layer": impl}, max_num_seqs=1).build(0, step.common)
    check(step, run(step, impl, metadata), Mask(causal=True))


def test_builders_share_scratch_memory_unless_they_run_at_a_time(vllm: Load) -> None:
    """Two engines of a process may: their configurations, and tables of layers, are apart."""
    step = make_step(vllm)

    def scratch(builder: Any) -> int:
        (plan,) = builder.build(0, step.common).plans.values()
        return plan.partials.data_ptr()

    first, other = (make_builder(vllm, {"layer": make_impl()}) for _ in range(2))
    config = copy.copy(first.vllm_config)  # as a drafter has one, of the same engine
    drafter = type(first)(first.kv_cache_spec, first.layer_names, config, first.device)
    config = copy.copy(config)
    config.parallel_config = SimpleNamespace(
        **{**vars(config.parallel_config), "use_ubatching": True}
    )
    micro = type(first)(first.kv_cache_spec, first.layer_names, config, first.device)
    assert scratch(first) == scratch(drafter)
    assert len({scratch(builder) for builder in (first, other, micro)}) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_that_are_loaded_again_reach_a_captured_graph(dtype: torch.dtype, vllm: Load) -> None:
    """It keeps the address of what run() was given."""
    weight = torch.nn.Parameter((torch.arange(HEADS) / 2).to(dtype), requires_grad=False)
    impl = make_impl(sinks=weight)
    impl.process_weights_after_loading(DTYPE)
    address = impl.sinks.data_ptr()

    def attend_and_check() -> None:
        step = make_step(vllm)
        metadata = make_builder(vllm, {"layer": impl}).build(0, step.common)
        impl.do_kv_cache_update(LAYER, step.k, step.v, step.cache, step.common.slot_mapping)
        output = torch.empty(step.q.shape[0], HEADS, DIM)
        impl.forward(LAYER, step.q, step.k, step.v, step.cache, metadata, output=output)
        check(step, output, Mask(causal=True, sinks=weight.float()))
        assert impl.sinks.data_ptr() == address

    attend_and_check()
    weight.data.copy_(torch.full((HEADS,), 3.0, dtype=dtype))  # as vLLM's loaders write
    attend_and_check()
    impl.process_weights_after_loading(DTYPE)  # as vLLM's reload ends
    attend_and_check()


@pytest.mark.parametrize(
    ("mode", "is_bounded"), [("FULL", False), ("FULL_DECODE_ONLY", True), ("PIECEWISE", True)]
)
def test_a_graph_for_mixed_steps_has_no_bound_on_rows(
    mode: str, is_bounded: bool, vllm: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is captured with few tokens a request, and later sees whole prompts."""
    common = make_step(vllm).common
    builder = make_builder(vllm, {"layer": make_impl()}, cudagraph_mode=mode)
    captured = builder.build_for_cudagraph_capture(common).batch
    assert captured.max_qo_len == (common.max_query_len if is_bounded else None)
    assert builder.build(0, common).batch.max_qo_len == common.max_query_len
    # vLLM's wrappers of builders override build() alone.
    monkeypatch.setattr(builder, "build", lambda *_: "the wrapper's")
    assert builder.build_for_cudagraph_capture(common) == "the wrapper's"


def test_a_graph_of_draft_steps_plans_again_in_the_same_memory(vllm: Load) -> None:
    """The lengths have grown since: a graph replays the planning, not build()."""
    step = make_step(vllm)
    lens = step.common.seq_lens.clone()
    step.common.seq_lens.copy_(step.common.query_start_loc.diff())  # as if no token were cached
    builder = make_builder(vllm, {"layer": make_impl()})
    metadata = builder.build(0, step.common)
    (plan,) = metadata.plans.values()
    before = plan.buffer.clone()
    step.common.seq_lens.copy_(lens)
    builder.update_draft_decode_metadata(metadata)
    (again,) = metadata.plans.values()
    assert again.buffer.data_ptr() == plan.buffer.data_ptr()
    updated = again.buffer.clone()
    assert not torch.equal(updated, before)
    (fresh,) = builder.build(0, step.common).plans.values()
    assert torch.equal(updated, fresh.buffer)


def test_any_batch_may_be_captured(vllm: Load) -> None:
    from fi_backend.integrations.vllm.builder import FIMetadataBuilder

    always = vllm("v1.attention.backend").AttentionCGSupport.ALWAYS
    assert FIMetadataBuilder.get_cudagraph_support(None, None) is always
