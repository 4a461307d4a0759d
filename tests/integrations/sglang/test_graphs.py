"""The hooks of SGLang's graphs: a step that is refilled has the plan and the pages of its batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference import Mask, attention
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_step import DIM, DTYPE, HEADS, KV_HEADS, SCALE, Server, make_layer

from fi_backend import workspace_bytes
from fi_backend.integrations.sglang.backend import FIAttnBackend

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LENS = (1900, 3, 700)  # several tiles, where the capture had one


def decode(lens: tuple[int, ...], dtype: torch.dtype, device: str) -> Any:
    return SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        batch_size=len(lens),
        req_pool_indices=torch.arange(len(lens), dtype=dtype, device=device) + 1,
        seq_lens=torch.tensor(lens, dtype=dtype, device=device),
        seq_lens_cpu=None,
        out_cache_loc=None,
        spec_info=None,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("page", [1, 16])
def test_long_requests_after_a_capture_with_short_ones(
    page: int, dtype: torch.dtype, device: str
) -> None:
    server = Server(device, page, slots=8192, context=2048)
    backend, layer = server.backend, make_layer()
    k, v = server.pool.get_kv_buffer(0)
    k.normal_()
    v.normal_()
    pages = torch.randperm(8192 // page)[: 3 * (2048 // page)].reshape(3, -1)
    table = pages.repeat_interleave(page, 1) * page + torch.arange(2048) % page
    server.requests.req_to_token[1:4, :2048] = table.to(device, torch.int32)
    q = torch.randn(len(LENS), HEADS * DIM, dtype=DTYPE, device=device)

    backend.init_cuda_graph_state(4, 4)
    backend.init_forward_metadata_out_graph(decode((1, 1, 1), dtype, device), in_capture=True)
    captured = backend.forward_metadata
    backend.forward_decode(q, None, None, layer, decode((1, 1, 1), dtype, device))
    ((_, plan),) = captured.plans.values()
    short = plan.buffer.clone()
    backend.init_forward_metadata_out_graph(decode((1, 1), dtype, device), in_capture=True)
    backend.init_forward_metadata_out_graph(decode(LENS, dtype, device))

    # The kernels of a stale plan are only slower, so that values do not tell.
    assert backend.forward_metadata is captured
    ((_, again),) = captured.plans.values()
    assert again.buffer.data_ptr() == plan.buffer.data_ptr()
    assert not torch.equal(again.buffer, short)
    out = backend.forward_decode(q, None, None, layer, decode(LENS, dtype, device)).cpu()
    for request, length in enumerate(LENS):
        slots = table[request, :length].to(device)
        keys, values = (x[slots].view(-1, KV_HEADS, DIM).cpu() for x in (k, v))
        one = q[request].cpu().view(1, HEADS, DIM)
        want, _ = attention(one, keys, values, Mask(causal=True), sm_scale=SCALE)
        torch.testing.assert_close(
            out[request].view(1, HEADS, DIM).double(), want, atol=2e-3, rtol=2e-3
        )


def test_scratch_memory_is_reserved_for_the_largest_step() -> None:
    """Memory that an eager step made larger would be gone from under the graphs."""
    server = Server("cpu")
    server.runner.model = torch.nn.ModuleList([make_layer()])
    backend = FIAttnBackend(server.runner)
    (spec,) = backend._model_specs(server.runner)
    most_requests = server.requests.req_to_token.shape[0]
    assert backend._workspace.num_bytes >= workspace_bytes(spec, most_requests, 0)
