"""Our backend inside those of SGLang's that hold several: each instance has its own step."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference import Mask
from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
from sglang.srt.layers.attention.tbo_backend import TboAttnBackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_step import DIM, HEADS, Server, Step, make_layer

from fi_backend.integrations.sglang.backend import FIAttnBackend

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Refuses:
    """A backend that must not be asked."""

    needs_cpu_seq_lens = True

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} of the wrong backend")


def part(batch: Any, requests: slice, rows: slice) -> Any:
    """The requests of a step that one of two overlapping batches has."""
    mine = copy.copy(batch)
    for name in ("req_pool_indices", "seq_lens", "seq_lens_cpu", "extend_seq_lens"):
        setattr(mine, name, getattr(batch, name)[requests])
    mine.batch_size = mine.seq_lens.shape[0]
    mine.out_cache_loc = batch.out_cache_loc[rows]
    return mine


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page", [1, 16])
def test_two_overlapping_batches(page: int, device: str) -> None:
    server = Server(device, page)
    step = Step(server, make_layer())
    wrapper = TboAttnBackend.init_new(lambda: FIAttnBackend(server.runner))
    middle = int(step.batch.extend_seq_lens[:2].sum())
    cuts = [(slice(0, 2), slice(0, middle)), (slice(2, None), slice(middle, None))]
    step.batch.tbo_children = [part(step.batch, *cut) for cut in cuts]
    wrapper.init_forward_metadata(step.batch)
    found = [
        # The second batch's layer runs after both have planned, and after the first one's.
        child.forward(step.q[rows], step.k[rows], step.v[rows], step.layer, batch)
        for child, batch, (_, rows) in zip(
            wrapper.children, step.batch.tbo_children, cuts, strict=True
        )
    ]
    step.check(torch.cat(found), Mask(causal=True))
    again = wrapper.forward(step.q, None, None, step.layer, step.batch)
    torch.testing.assert_close(again, torch.cat(found))


@pytest.mark.parametrize("device", DEVICES)
def test_two_overlapping_batches_in_a_graph(device: str) -> None:
    """SGLang splits what it shows before a replay; each child refills a step of its own."""
    server = Server(device, 16)
    wrapper = TboAttnBackend.init_new(lambda: FIAttnBackend(server.runner))
    wrapper.init_cuda_graph_state(4, 4)
    lens = torch.tensor([70, 5, 50, 33])
    shown = SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        batch_size=4,
        req_pool_indices=torch.arange(1, 5, device=device),
        seq_lens=lens.to(device),
        seq_lens_cpu=lens,
        out_cache_loc=None,
        spec_info=None,
    )
    wrapper.init_forward_metadata_out_graph(shown)
    left, right = (child.forward_metadata.batch.kv_lens for child in wrapper.children)
    assert left.tolist() == [70, 5]
    assert right.tolist() == [50, 33]
    assert wrapper.primary.forward_metadata.batch.kv_lens.tolist() == lens.tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", [ForwardMode.MIXED, ForwardMode.DECODE])
def test_another_backend_for_the_other_kind_of_step(mode: ForwardMode, device: str) -> None:
    """--prefill-attention-backend and --decode-attention-backend."""
    server = Server(device, speculative_attention_mode="prefill", speculative_algorithm=None)
    server.runner.kv_cache_dtype = server.runner.dtype
    decodes = mode == ForwardMode.DECODE
    pair = (Refuses(), server.backend) if decodes else (server.backend, Refuses())
    wrapper = HybridAttnBackend(server.runner, *pair)
    assert not FIAttnBackend.needs_cpu_seq_lens
    step = Step(server, make_layer())
    if not decodes:
        wrapper.init_forward_metadata(step.batch)
        step.check(
            wrapper.forward(step.q, step.k, step.v, step.layer, step.batch), Mask(causal=True)
        )
        return
    wrapper.init_cuda_graph_state(8, 8)
    batch = part(step.batch, slice(0, 2), slice(0, 2))
    batch.forward_mode = mode
    q = torch.randn(2, HEADS * DIM, dtype=step.q.dtype, device=device)
    wrapper.init_forward_metadata(batch)
    eager = wrapper.forward(q, None, None, step.layer, batch)
    wrapper.init_forward_metadata_out_graph(batch)
    assert torch.equal(wrapper.forward(q, None, None, step.layer, batch), eager)
