"""Layers and caches of every form that vLLM makes: heads, pages, layouts, dtypes, causality."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference import Mask

from tests.integrations.vllm_step import (
    DTYPE,
    LAYER,
    PLAIN,
    REQUESTS,
    Load,
    Shape,
    Step,
    check,
    make_builder,
    make_impl,
    make_step,
    run,
)

CAUSAL = Mask(causal=True)


def run_step(vllm: Load, step: Step, shape: Shape = PLAIN, **arguments: Any) -> torch.Tensor:
    impl = make_impl(shape, **arguments)
    return run(step, impl, make_builder(vllm, {"layer": impl}, shape=shape).build(0, step.common))


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_head_sizes(dim: int, vllm: Load) -> None:
    shape = replace(PLAIN, dim=dim)
    step = make_step(vllm, shape=shape)
    check(step, run_step(vllm, step, shape), CAUSAL)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 1), (6, 2), (5, 1), (14, 2), (7, 7)])
def test_heads_per_key_head(heads: int, kv_heads: int, vllm: Load) -> None:
    shape = replace(PLAIN, heads=heads, kv_heads=kv_heads)
    step = make_step(vllm, shape=shape)
    check(step, run_step(vllm, step, shape), CAUSAL)


@pytest.mark.parametrize("page", [16, 32, 48, 80, 128, 528])
def test_pages(page: int, vllm: Load) -> None:
    """Models that mix attention with other layers get multiples of 16 that are no power of 2."""
    shape = replace(PLAIN, page=page)
    step = make_step(vllm, shape=shape)
    check(step, run_step(vllm, step, shape), CAUSAL)


def five_dims(cache: torch.Tensor) -> torch.Tensor:
    """vLLM 0.25's [pages, 2, page, heads, dim] with the values of 0.32's tensor."""
    keys, values = cache.transpose(1, 2).chunk(2, -1)
    return torch.stack([keys, values], 1)


def with_strides(cache: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The same tensor with its dimensions in this order in memory."""
    back = [order.index(i) for i in range(cache.dim())]
    return cache.permute(order).contiguous().permute(back)


def in_wider_pages(cache: torch.Tensor) -> torch.Tensor:
    """A layer's part of pages that several layers share, and that end with padding."""
    pages = torch.full((cache.shape[0], 3 * cache[0].numel() + 32), float("nan"))
    mine = pages[:, cache[0].numel() : 2 * cache[0].numel()].unflatten(1, cache.shape[1:])
    mine.copy_(cache)
    return mine


LAYOUTS = {
    "0.25, tokens first": lambda cache: five_dims(cache),
    "0.25, heads first": lambda cache: with_strides(five_dims(cache), (0, 1, 3, 2, 4)),
    "0.32, heads first": lambda cache: with_strides(cache, (0, 1, 2, 3)),
    "0.32, tokens first": lambda cache: with_strides(cache, (0, 2, 1, 3)),
    "0.32, heads outermost": lambda cache: with_strides(cache, (1, 0, 2, 3)),
    "pages of several layers": in_wider_pages,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_read_and_written_in_place(layout: str, vllm: Load) -> None:
    """What a KV connector moves is the engine's tensor: no layout is copied or repacked."""
    step = make_step(vllm)
    step.cache = LAYOUTS[layout](step.cache)
    check(step, run_step(vllm, step), CAUSAL)
    stored = step.cache[:, 0] if step.cache.dim() == 5 else step.cache.transpose(1, 2)
    slots = step.common.slot_mapping
    pages, offsets = slots[slots >= 0] // PLAIN.page, slots[slots >= 0] % PLAIN.page
    assert torch.equal(stored[pages, offsets][..., : PLAIN.dim], step.k[: len(pages)])


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp8", "float8_e4m3fn"), ("fp8_e4m3", "float8_e4m3fn"), ("fp8_e5m2",) * 2]
)
def test_fp8_caches_have_scales(name: str, dtype: str, vllm: Load) -> None:
    """vLLM hands them over as bytes; values out of the format's reach are there by their scale."""
    stored = torch.float8_e5m2 if "e5m2" in dtype else getattr(torch, dtype)
    scales = {"_k_scale_float": 2.0, "_v_scale_float": 0.25}
    step = make_step(vllm)
    k_part, v_part = step.cache.chunk(2, -1)
    parts = (k_part / 2.0).to(stored), (v_part / 0.25).to(stored)
    step.cache = torch.cat([part.view(torch.uint8) for part in parts], -1)

    def rounded(rows: torch.Tensor, scale: float) -> torch.Tensor:
        return (rows / scale).to(stored).float() * scale

    step.keys = [rounded(rows, 2.0) for rows in step.keys]
    step.values = [rounded(rows, 0.25) for rows in step.values]
    layer = type("Layer", (), scales)()
    impl = make_impl(kv_cache_dtype=name)
    metadata = make_builder(vllm, {"layer": impl}).build(0, step.common)
    check(step, run(step, impl, metadata, layer), CAUSAL)


@pytest.mark.parametrize("name", ["auto", "bfloat16"])
def test_other_caches_have_none(name: str, vllm: Load) -> None:
    """Scales of a checkpoint for an fp8 cache, where the user asked for another or left it out."""
    dtype = DTYPE if name == "auto" else torch.bfloat16
    step = make_step(vllm)
    step.cache = step.cache.to(dtype)
    step.keys = [rows.to(dtype).to(DTYPE) for rows in step.keys]
    step.values = [rows.to(dtype).to(DTYPE) for rows in step.values]
    layer = SimpleNamespace(_k_scale_float=2.0, _v_scale_float=0.25)
    impl = make_impl(kv_cache_dtype=name)
    metadata = make_builder(vllm, {"layer": impl}).build(0, step.common)
    check(step, run(step, impl, metadata, layer), CAUSAL)


def test_a_decoder_without_causality(vllm: Load) -> None:
    """Drafts in parallel: tokens of a step see each other, behind a cache."""
    step, impl = make_step(vllm), make_impl()
    step.common.causal = False
    metadata = make_builder(vllm, {"layer": impl}).build(0, step.common)
    check(step, run(step, impl, metadata), Mask())


def test_cross_attention_reads_an_encoders_cache(vllm: Load) -> None:
    """As many tokens as there are: the lengths are the encoder's, and nothing is causal."""
    step = make_step(vllm)
    impl = make_impl(attn_type="encoder_decoder")
    step.common.causal = False
    impl.do_kv_cache_update(LAYER, step.k, step.v, step.cache, step.common.slot_mapping)
    metadata = make_builder(vllm, {"layer": impl}).build(0, step.common)
    output = torch.empty_like(step.q)
    impl.forward(LAYER, step.q, None, None, step.cache, metadata, output=output)
    check(step, output, Mask())


def test_memory_that_was_given_back_and_replaced(vllm: Load) -> None:
    """Sleep and wake: the same tensor object gets other memory, or the layer another tensor."""
    step, impl = make_step(vllm), make_impl()
    builder = make_builder(vllm, {"layer": impl})
    run(step, impl, builder.build(0, step.common))
    again = make_step(vllm)
    cache = step.cache
    cache.set_(again.cache)
    again.cache = cache
    check(again, run(again, impl, builder.build(0, again.common)), CAUSAL)


def test_steps_of_many_kinds_share_a_builder(vllm: Load) -> None:
    """Decodes alone, then everything, then a decode again: no length of one is left for another."""
    step, impl = make_step(vllm), make_impl()
    builder = make_builder(vllm, {"layer": impl})
    whole = run(step, impl, builder.build(0, step.common))
    for count in (2, len(REQUESTS), 1):
        tokens = int(step.common.query_start_loc[count])
        part = step.common.replace(
            query_start_loc=step.common.query_start_loc[: count + 1],
            seq_lens=step.common.seq_lens[:count],
            block_table_tensor=step.common.block_table_tensor[:count],
            num_reqs=count,
            num_actual_tokens=tokens,
        )
        q, output = step.q[:tokens], torch.full(step.q.shape, 7.0, dtype=DTYPE)
        metadata = builder.build(0, part)
        impl.forward(LAYER, q, None, None, step.cache, metadata, output=output[:tokens])
        torch.testing.assert_close(output[:tokens], whole[:tokens], atol=2e-5, rtol=2e-5)
        assert bool((output[tokens:] == 7.0).all())


@pytest.mark.parametrize("is_neox", [True, False])
def test_rope_and_the_write_in_one_call(is_neox: bool, vllm: Load) -> None:
    """vLLM's compiler calls it in the place of both; the angles are in the model's dtype."""
    assert hasattr(vllm("v1.attention.backend").AttentionImpl, "do_rope_and_kv_cache_update")
    step, impl = make_step(vllm), make_impl()
    assert impl.fused_rope_kvcache_supported()
    assert not make_impl(attn_type="encoder_only").fused_rope_kvcache_supported()
    tokens, rotary = step.k.shape[0], PLAIN.dim // 2
    step.q = step.q[:tokens]
    positions = torch.randint(0, 100, (tokens,))
    angles = torch.rand(100, rotary // 2) * 6.28
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1).to(DTYPE)

    def rotated(rows: torch.Tensor) -> torch.Tensor:
        cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, -1)
        turned, rest = rows[..., :rotary], rows[..., rotary:]
        if is_neox:
            a, b = turned.chunk(2, -1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        else:
            a, b = turned[..., ::2], turned[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        return torch.cat([turned, rest], -1)

    q, cache = step.q.clone(), step.cache.clone()
    impl.do_kv_cache_update(LAYER, rotated(step.k), step.v, cache, step.common.slot_mapping)
    make_impl().do_rope_and_kv_cache_update(
        LAYER, q, step.k, step.v, positions, cos_sin, is_neox, step.cache, step.common.slot_mapping
    )
    torch.testing.assert_close(step.cache, cache, atol=1e-5, rtol=1e-5, equal_nan=True)
    torch.testing.assert_close(q, rotated(step.q), atol=1e-5, rtol=1e-5)
