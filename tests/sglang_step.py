"""Batches of SGLang's own classes on its own pools, for tests in its process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from reference import Mask, attention, torch_attention
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from tolerance import assert_accurate

from fi_backend.integrations.sglang import kv_cache
from fi_backend.integrations.sglang.backend import FIAttnBackend

DTYPE = torch.float16
HEADS, KV_HEADS, DIM = 6, 2, 64
SCALE = DIM**-0.5
CONTEXT, SLOTS = 96, 1024
# (tokens in this step, tokens in all): decode, chunk, whole prompt, nothing at all.
REQUESTS = ((1, 70), (1, 5), (20, 50), (33, 33), (0, 0))


class Server:
    """A ModelRunner, as far as our backend looks at it, with a pool of each kind of cache."""

    def __init__(
        self,
        device: str,
        page: int = 1,
        kv_dtype: torch.dtype = DTYPE,
        v_dim: int = DIM,
        slots: int = SLOTS,
        context: int = CONTEXT,
        window_layers: tuple[int, ...] = (),
        **arguments: Any,
    ) -> None:
        self.device, self.page, self.v_dim = device, page, v_dim
        sizes = {"page_size": page, "dtype": kv_dtype, "head_num": KV_HEADS, "head_dim": DIM}
        if window_layers:
            self.pool = SWAKVPool(
                SLOTS,
                SLOTS // 2,
                swa_attention_layer_ids=list(window_layers),
                full_attention_layer_ids=[0],
                device=device,
                **sizes,
            )
            # Of the full pool's slots only the first half is used, see Step.
            pages = torch.randperm(SLOTS // 2 // page).repeat_interleave(page)
            slot_map = pages * page + torch.arange(SLOTS // 2) % page
            self.pool.register_mapping(slot_map.to(device))
        else:
            self.pool = MHATokenToKVPool(
                slots,
                v_head_dim=v_dim,
                layer_num=1,
                device=device,
                enable_memory_saver=False,
                enable_alt_stream=False,
                **sizes,
            )
        self.requests = ReqToTokenPool(len(REQUESTS), context, device, enable_memory_saver=False)
        self.runner = SimpleNamespace(
            token_to_kv_pool=self.pool,
            req_to_token_pool=self.requests,
            token_to_kv_pool_allocator=SimpleNamespace(),
            model_config=SimpleNamespace(context_len=context, is_encoder_decoder=False),
            use_mla_backend=False,
            device=device,
            page_size=page,
            server_args=SimpleNamespace(**arguments),
            dtype=DTYPE,
            model=None,
        )
        self.backend = FIAttnBackend(self.runner)


def make_layer(layer_id: int = 0, **arguments: Any) -> RadixAttention:
    return RadixAttention(HEADS, DIM, SCALE, KV_HEADS, layer_id, **arguments)


class Step:
    """A mixed step: cached tokens are in the pool, those of the step in k and v alone."""

    def __init__(self, server: Server, layer: RadixAttention, rows: int = 0) -> None:
        self.server, self.layer = server, layer
        device = server.device
        new = [tokens for tokens, _ in REQUESTS]
        lens = [total for _, total in REQUESTS]
        pages_each = CONTEXT // server.page
        # Half of the slots: the others have no place in a window pool.
        order = torch.randperm(SLOTS // 2 // server.page - 1)[: len(REQUESTS) * pages_each] + 1
        table = order.reshape(len(REQUESTS), pages_each).repeat_interleave(server.page, 1)
        table = table * server.page + torch.arange(CONTEXT) % server.page
        self.rows = torch.arange(len(REQUESTS)).flip(0) + 1  # row 0 is for padding
        server.requests.req_to_token[self.rows, :CONTEXT] = table.to(device, torch.int32)
        self.keys = [torch.randn(n, KV_HEADS, DIM, dtype=DTYPE, device=device) for n in lens]
        self.values = [
            torch.randn(n, KV_HEADS, server.v_dim, dtype=DTYPE, device=device) for n in lens
        ]
        done = [total - tokens for tokens, total in REQUESTS]
        self.write(
            torch.cat([table[r, : done[r]] for r in range(len(REQUESTS))]).to(device),
            torch.cat([self.keys[r][: done[r]] for r in range(len(REQUESTS))]),
            torch.cat([self.values[r][: done[r]] for r in range(len(REQUESTS))]),
        )
        slots = [table[r, done[r] : lens[r]] for r in range(len(REQUESTS))]
        self.batch = ForwardBatch(
            forward_mode=ForwardMode.MIXED,
            batch_size=len(REQUESTS),
            input_ids=torch.zeros(sum(new), dtype=torch.int64, device=device),
            req_pool_indices=self.rows.to(device),
            seq_lens=torch.tensor(lens, device=device),
            seq_lens_cpu=torch.tensor(lens),
            seq_lens_sum=sum(lens),
            out_cache_loc=torch.cat(slots).to(device),
            extend_seq_lens=torch.tensor(new, dtype=torch.int32, device=device),
        )
        self.k = torch.cat([self.keys[r][done[r] :] for r in range(len(REQUESTS))])
        self.v = torch.cat([self.values[r][done[r] :] for r in range(len(REQUESTS))])
        # A slice of a fused projection, as models hand it over.
        fused = torch.randn(sum(new), (HEADS + KV_HEADS) * DIM, dtype=DTYPE, device=device)
        self.q = fused[:, : HEADS * DIM]

    def write(self, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        slot_map = kv_cache.window_slots(self.server.pool)
        mapped = None if slot_map is None else slot_map[slots]
        # The pool may change what it is given.
        kv_cache.write(self.server.pool, self.layer, k.clone(), v.clone(), slots, mapped)

    def run(self, **options: Any) -> torch.Tensor:
        backend = self.server.backend
        backend.init_forward_metadata(self.batch)
        k, v = self.k.clone(), self.v.clone()
        return backend.forward(self.q, k, v, self.layer, self.batch, **options)

    def check(self, out: torch.Tensor, mask: Mask, k_scale: float = 1, v_scale: float = 1) -> None:
        assert out.shape == (self.q.shape[0], HEADS * self.server.v_dim)
        rows = self.q.unflatten(1, (HEADS, DIM)).cpu().split([n for n, _ in REQUESTS])
        outs = out.unflatten(1, (HEADS, self.server.v_dim)).cpu().split([n for n, _ in REQUESTS])
        kv_dtype = self.server.pool.dtype
        for index, (q, got) in enumerate(zip(rows, outs, strict=True)):
            if not len(q):
                continue
            k, v = self.keys[index].cpu(), self.values[index].cpu()
            if kv_dtype != DTYPE:
                k = (k / k_scale).to(kv_dtype).to(DTYPE) * k_scale
                v = (v / v_scale).to(kv_dtype).to(DTYPE) * v_scale
            want, _ = attention(q, k, v, mask, sm_scale=SCALE)
            same = torch_attention(q, k, v, mask, sm_scale=SCALE)
            assert_accurate(got, want, same, f"request {index}")
