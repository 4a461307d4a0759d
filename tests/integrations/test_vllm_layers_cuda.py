"""Builder and layers on a GPU: values, no waiting, and graphs that serve other batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sync_debug import nothing_waits

from tests.integrations.test_vllm_layers import VARIANTS
from tests.integrations.vllm_step import (
    DIM,
    HEADS,
    LAYER,
    REQUESTS,
    SCALE,
    Load,
    Step,
    make_builder,
    make_impl,
    make_step,
)
from tests.reference import Mask, attention

pytestmark = pytest.mark.gpu

DTYPE = torch.bfloat16


def to_gpu(step: Step) -> Step:
    common = step.common.replace(
        query_start_loc=step.common.query_start_loc.cuda(),
        seq_lens=step.common.seq_lens.cuda(),
        block_table_tensor=step.common.block_table_tensor.cuda(),
        slot_mapping=step.common.slot_mapping.cuda(),
    )
    on_gpu = {name: getattr(step, name).cuda() for name in ("q", "k", "v", "cache")}
    return replace(step, common=common, **on_gpu)


def make_impl_on_gpu(**arguments: Any) -> Any:
    with torch.device("cuda"):  # as the engine makes models
        impl = make_impl(**arguments)
    impl.process_weights_after_loading(DTYPE)
    return impl


def run_layer(step: Step, impl: Any, metadata: Any, output: torch.Tensor) -> None:
    impl.do_kv_cache_update(LAYER, step.k, step.v, step.cache, step.common.slot_mapping)
    impl.forward(LAYER, step.q, step.k, step.v, step.cache, metadata, output=output)


def check(step: Step, output: torch.Tensor, mask: Mask) -> None:
    for request, (tokens, _) in enumerate(REQUESTS):
        if tokens:
            mine = step.tokens(request)
            q = step.q[mine].cpu()
            want, _ = attention(q, step.keys[request], step.values[request], mask, sm_scale=SCALE)
            got = output[mine].double().cpu()
            torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_equals_reference(variant: str, vllm: Load) -> None:
    arguments, mask = VARIANTS[variant]
    arguments = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    step, impl = to_gpu(make_step(vllm, DTYPE)), make_impl_on_gpu(**arguments)
    builder = make_builder(vllm, {"layer": impl}, dtype=DTYPE, device="cuda:0")
    output = torch.full((step.q.shape[0], HEADS, DIM), 7.0, dtype=DTYPE, device="cuda")
    run_layer(step, impl, builder.build(0, step.common), output)
    check(step, output, Mask(causal=True, **mask))
    tokens = int(step.common.query_start_loc[-1])
    assert bool((output[tokens:] == 7.0).all())


def test_a_step_neither_waits_nor_allocates(vllm: Load) -> None:
    step = to_gpu(make_step(vllm, DTYPE))
    impls = {"a": make_impl_on_gpu(), "b": make_impl_on_gpu(sliding_window=8)}
    builder = make_builder(vllm, impls, dtype=DTYPE, device="cuda:0")
    output = torch.empty(step.q.shape[0], HEADS, DIM, dtype=DTYPE, device="cuda")

    def run_step() -> None:
        metadata = builder.build(0, step.common)
        for impl in impls.values():
            run_layer(step, impl, metadata, output)

    run_step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with nothing_waits():
        for _ in range(3):
            run_step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.parametrize("plans_inside", [False, True])
def test_a_graph_of_a_layer_serves_other_batches(plans_inside: bool, vllm: Load) -> None:
    """As the engine does it: capture a layer, then plan each step outside and replay.

    A graph of a draft model's steps plans them, too.
    """
    step, impl = to_gpu(make_step(vllm, DTYPE)), make_impl_on_gpu()
    layers = {"layer": impl}
    builder = make_builder(vllm, layers, dtype=DTYPE, device="cuda:0", cudagraph_mode="FULL")
    output = torch.zeros(step.q.shape[0], HEADS, DIM, dtype=DTYPE, device="cuda")
    common = step.common
    persistent = (
        common.query_start_loc,
        common.seq_lens,
        common.block_table_tensor,
        common.slot_mapping,
    )
    values = [tensor.clone() for tensor in persistent]
    # The engine captures with a token for each request, null pages, and slots that write nothing.
    common.slot_mapping.fill_(-1)
    common.block_table_tensor.zero_()
    common.query_start_loc.copy_(torch.arange(len(REQUESTS) + 1))
    common.seq_lens.fill_(1)
    run_layer(step, impl, builder.build_for_cudagraph_capture(common), output)
    metadata = builder.build_for_cudagraph_capture(common)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        if plans_inside:
            builder.update_draft_decode_metadata(metadata)
        run_layer(step, impl, metadata, output)

    def replay() -> None:
        if not plans_inside:
            builder.build(0, common)
        graph.replay()

    for tensor, value in zip(persistent, values, strict=True):
        tensor.copy_(value)
    replay()
    check(step, output, Mask(causal=True))

    # Only the first two requests are left, with a token each; the rest is padding.
    common.query_start_loc[3:] = 2
    common.seq_lens[2:] = 0
    common.block_table_tensor[2:] = 0
    common.slot_mapping[2:] = -1
    output.fill_(7.0)
    replay()
    assert bool((output[2:] == 7.0).all())
    for request in range(2):
        q = step.q[request : request + 1].cpu()
        keys, values = step.keys[request], step.values[request]
        want, _ = attention(q, keys, values, Mask(causal=True), sm_scale=SCALE)
        got = output[request : request + 1].double().cpu()
        torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)
