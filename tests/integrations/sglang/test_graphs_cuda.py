"""A CUDA graph of SGLang's: captured with one batch, replayed with others, without a host wait."""

from __future__ import annotations

import unittest
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.test.kits.attention_unittest.attention_methods import dense_attention as dense
from sync_debug import nothing_waits

pytestmark = pytest.mark.gpu

REQUESTS = 4


def fixture(case: unittest.TestCase, page: int, prefix_lens: tuple[int, ...]) -> Any:
    step = dense.DenseAttentionCase(
        name="graph",
        backend="fi_backend",
        forward_mode=ForwardMode.DECODE,
        num_heads=8,
        num_kv_heads=2,
        page_size=page,
        prefix_lens=prefix_lens,
    )
    return dense.build_dense_attention_fixture(
        case, step, head_dim=64, hidden_size=256, device="cuda", disable_cuda_graph=False
    )


def as_replayed(batch: Any, seq_lens: torch.Tensor) -> SimpleNamespace:
    """What SGLang shows before a replay; the lengths' buffer stays where it is."""
    return SimpleNamespace(
        batch_size=batch.batch_size,
        forward_mode=batch.forward_mode,
        req_pool_indices=batch.req_pool_indices,
        seq_lens=seq_lens,
        seq_lens_cpu=None,
        seq_lens_sum=None,
        out_cache_loc=batch.out_cache_loc,
        spec_info=None,
    )


@pytest.mark.parametrize("page", [1, 16])
def test_replays_equal_eager_bit_for_bit(page: int, case: unittest.TestCase) -> None:
    made = fixture(case, page, (40, 3, 17, 62))
    backend, batch = made.backend, made.forward_batch
    hidden = made.input_hidden.clone()
    lens = batch.seq_lens.clone()
    with torch.no_grad(), forward_context(ForwardContext(attn_backend=backend)):
        backend.init_forward_metadata(batch)
        eager = made.actual_module(hidden, batch)
        backend.init_cuda_graph_state(REQUESTS, REQUESTS)
        buffer = torch.ones_like(lens)
        backend.init_forward_metadata_out_graph(as_replayed(batch, buffer), in_capture=True)
        made.actual_module(hidden, batch)  # compiles and plans
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            backend.init_forward_metadata_in_graph(batch)
            replayed = made.actual_module(hidden, batch)
        for _ in range(2):  # the second time over the first one's results
            buffer.copy_(lens)
            backend.init_forward_metadata_out_graph(as_replayed(batch, buffer))
            graph.replay()
            assert torch.equal(replayed, eager)
        buffer.fill_(1)
        backend.init_forward_metadata_out_graph(as_replayed(batch, buffer))
        graph.replay()
        assert not torch.equal(replayed, eager)


@pytest.mark.parametrize("page", [1, 16])
def test_nothing_waits_for_the_device(page: int, case: unittest.TestCase) -> None:
    made = fixture(case, page, (40, 3, 17, 62))
    backend, batch = made.backend, made.forward_batch
    with torch.no_grad(), forward_context(ForwardContext(attn_backend=backend)):
        backend.init_cuda_graph_state(REQUESTS, REQUESTS)
        backend.init_forward_metadata(batch)
        made.actual_module(made.input_hidden, batch)  # compiles and allocates
        backend.init_forward_metadata_out_graph(as_replayed(batch, batch.seq_lens))
        with nothing_waits():
            backend.init_forward_metadata_out_graph(as_replayed(batch, batch.seq_lens))
            backend.init_forward_metadata(batch)
            made.actual_module(made.input_hidden, batch)
