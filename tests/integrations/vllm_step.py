"""A step of an engine and one layer, on vLLM's own metadata classes, for tests of the adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from reference import Mask, attention

Load = Callable[[str], ModuleType]
HEADS, KV_HEADS, DIM, PAGE = 6, 2, 64, 16
DTYPE = torch.float32
# (tokens in this step, tokens in all): decode, chunk, whole prompt, padding request.
REQUESTS = ((1, 70), (1, 5), (20, 50), (33, 33), (0, 0))
PADDING = 3
LAYER = SimpleNamespace(_k_scale_float=1.0, _v_scale_float=1.0)


@dataclass(frozen=True)
class Shape:
    """Of a layer and its cache."""

    heads: int = HEADS
    kv_heads: int = KV_HEADS
    dim: int = DIM
    page: int = PAGE

    @property
    def scale(self) -> float:
        return float(self.dim**-0.5)


PLAIN = Shape()
SCALE = PLAIN.scale


@dataclass
class Step:
    """A step's tensors as the engine lays them out, and what is behind them."""

    common: Any
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cache: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    def tokens(self, request: int) -> slice:
        starts = self.common.query_start_loc.tolist()
        return slice(starts[request], starts[request + 1])


def make_step(vllm: Load, dtype: torch.dtype = DTYPE, shape: Shape = PLAIN) -> Step:
    """Cached tokens are in the cache already; those of this step are in k and v alone."""
    heads, kv_heads, dim, page = shape.heads, shape.kv_heads, shape.dim, shape.page
    new = [tokens for tokens, _ in REQUESTS]
    lens = [total for _, total in REQUESTS]
    starts = torch.tensor([0, *torch.tensor(new).cumsum(0)], dtype=torch.int32)
    num_tokens = int(starts[-1])
    pages_each = max(lens) // page + 2
    order = torch.randperm(len(REQUESTS) * pages_each) + 1  # page 0 is vLLM's null page
    table = order.reshape(len(REQUESTS), pages_each).to(torch.int32)
    cache = torch.full((order.numel() + 1, kv_heads, page, 2 * dim), float("nan"), dtype=dtype)
    keys = [torch.randn(n, kv_heads, dim, dtype=dtype) for n in lens]
    values = [torch.randn(n, kv_heads, dim, dtype=dtype) for n in lens]
    slots = torch.full((num_tokens + PADDING,), -1, dtype=torch.int64)
    k = torch.randn(num_tokens + PADDING, kv_heads, dim, dtype=dtype)
    v = torch.randn_like(k)
    for request, (tokens, total) in enumerate(REQUESTS):
        positions = torch.arange(total)
        where = table[request, positions // page].long() * page + positions % page
        done = total - tokens
        rows = torch.cat([keys[request], values[request]], -1)
        cache[where[:done] // page, :, where[:done] % page] = rows[:done]
        mine = slice(int(starts[request]), int(starts[request + 1]))
        slots[mine] = where[done:]
        k[mine], v[mine] = keys[request][done:], values[request][done:]
        table[request, (total + page - 1) // page :] = 2**31 - 1  # stale entries are garbage
    common = vllm("v1.attention.backend").CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(lens, dtype=torch.int32),
        num_reqs=len(REQUESTS),
        num_actual_tokens=num_tokens + PADDING,
        max_query_len=max(new),
        max_seq_len=max(lens),
        block_table_tensor=table,
        slot_mapping=slots,
    )
    # A slice of a fused projection, as models hand it over.
    fused = torch.randn(num_tokens + PADDING + 2, (heads + 2 * kv_heads) * dim, dtype=dtype)
    q = fused[:, : heads * dim].unflatten(1, (heads, dim))
    return Step(common, q, k, v, cache, keys, values)


def make_impl(shape: Shape = PLAIN, **arguments: Any) -> Any:
    from fi_backend.integrations.vllm.impl import FIAttentionImpl

    return FIAttentionImpl(shape.heads, shape.dim, shape.scale, shape.kv_heads, **arguments)


def make_builder(
    vllm: Load,
    impls: dict[str, Any],
    spec: Any = None,
    *,
    shape: Shape = PLAIN,
    dtype: torch.dtype = DTYPE,
    device: str = "cpu",
    max_num_seqs: int = 8,
    cudagraph_mode: str = "FULL_DECODE_ONLY",
    interleave: int = 1,
    other_groups: dict[str, Any] | None = None,
) -> Any:
    from fi_backend.integrations.vllm.builder import FIMetadataBuilder

    spec = spec or vllm("v1.kv_cache_interface").FullAttentionSpec(
        block_size=shape.page, num_kv_heads=shape.kv_heads, head_size=shape.dim, dtype=dtype
    )
    every = {**impls, **(other_groups or {})}
    layers = {name: SimpleNamespace(impl=impl) for name, impl in every.items()}
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(
            static_forward_context=layers,
            cudagraph_mode=vllm("config").CUDAGraphMode[cudagraph_mode],
        ),
        model_config=SimpleNamespace(dtype=dtype),
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
        parallel_config=SimpleNamespace(
            use_ubatching=False, cp_kv_cache_interleave_size=interleave
        ),
    )
    return FIMetadataBuilder(spec, [*impls, "placeholder"], config, torch.device(device))


def check(step: Step, output: torch.Tensor, mask: Mask) -> None:
    """Compare with attention in fp64 over each request's keys, those of this step included."""
    scale = step.q.shape[2] ** -0.5
    for request, (tokens, _) in enumerate(REQUESTS):
        if tokens:
            mine = step.tokens(request)
            keys, values = step.keys[request], step.values[request]
            want, _ = attention(step.q[mine], keys, values, mask, sm_scale=scale)
            torch.testing.assert_close(output[mine].double(), want, atol=2e-5, rtol=2e-5)


def run(step: Step, impl: Any, metadata: Any, layer: Any = LAYER) -> torch.Tensor:
    """Run the layer as the engine does, write and attend; return its output."""
    impl.process_weights_after_loading(DTYPE)
    impl.do_kv_cache_update(layer, step.k, step.v, step.cache, step.common.slot_mapping)
    output = torch.full(step.q.shape, 7.0, dtype=step.q.dtype)
    returned = impl.forward(layer, step.q, step.k, step.v, step.cache, metadata, output=output)
    assert returned is output
    assert bool((output[step.common.num_actual_tokens :] == 7.0).all())
    return output
