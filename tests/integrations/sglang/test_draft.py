"""The steps in which a draft model decodes: chains and trees of drafts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference import Mask, attention
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_step import DIM, DTYPE, HEADS, KV_HEADS, SCALE, Server, make_layer

from fi_backend.errors import UnsupportedError
from fi_backend.integrations.sglang.draft import MultiStepDraftBackend

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PREFIX_LENS = (7, 0, 40)
STEPS = 4


def make_batch(server: Server, lens: tuple[int, ...]) -> Any:
    return SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        batch_size=len(lens),
        req_pool_indices=torch.arange(len(lens), device=server.device) + 1,
        seq_lens=torch.tensor(lens, device=server.device),
        seq_lens_cpu=torch.tensor(lens),
        seq_lens_sum=sum(lens),
        spec_info=None,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize(("page", "topk"), [(1, 1), (1, 3), (16, 1)])
def test_branches_see_the_prefix_and_their_own_drafts(
    page: int, topk: int, in_graph: bool, device: str
) -> None:
    server = Server(device, page)
    draft = MultiStepDraftBackend(server.runner, topk, STEPS)
    layer, batch = make_layer(), make_batch(server, PREFIX_LENS)
    k, v = server.pool.get_kv_buffer(0)
    k.normal_()
    v.normal_()
    pages = torch.randperm(k.shape[0] // page)[: 5 * (96 // page)].reshape(5, -1)
    table = pages.repeat_interleave(page, 1) * page + torch.arange(96) % page
    server.requests.req_to_token[1:6, :96] = table.to(device, torch.int32)
    if in_graph:
        draft.init_cuda_graph_state(len(PREFIX_LENS) + 2, topk * (len(PREFIX_LENS) + 2))
        draft.init_forward_metadata_out_graph(make_batch(server, (1, 1, 1)), in_capture=True)
        draft.init_forward_metadata_out_graph(batch)
        draft.init_forward_metadata_in_graph(batch)
    else:
        draft.init_forward_metadata(batch)
    assert len(draft.attn_backends) == STEPS - 1
    for index, backend in enumerate(draft.attn_backends):
        q = torch.randn(len(PREFIX_LENS) * topk, HEADS * DIM, dtype=DTYPE, device=device)
        out = backend.forward(q, None, None, layer, batch).cpu()
        for row in range(q.shape[0]):
            request, branch = divmod(row, topk)
            begin = PREFIX_LENS[request]
            own = begin + branch * STEPS
            slots = torch.cat([table[request, :begin], table[request, own : own + index + 1]])
            keys, values = (x[slots.to(device)].view(-1, KV_HEADS, DIM).cpu() for x in (k, v))
            one = q[row].cpu().view(1, HEADS, DIM)
            want, _ = attention(one, keys, values, Mask(causal=True), sm_scale=SCALE)
            torch.testing.assert_close(
                out[row].view(1, HEADS, DIM).double(), want, atol=2e-3, rtol=2e-3
            )


def test_branches_do_not_share_pages() -> None:
    server = Server("cpu", page=16)
    with pytest.raises(UnsupportedError, match="topk 2 and --page-size 16"):
        MultiStepDraftBackend(server.runner, 2, STEPS)
