"""Layers on SGLang's own pools and batches: what its kit does not ask for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import Mask
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_step import DIM, HEADS, Server, Step, make_layer

from fi_backend.errors import UnsupportedError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
E4M3 = torch.float8_e4m3fn


LAYERS = {
    "plain": ({}, {}),
    "window": ({"sliding_window_size": 23}, {"window_left": 23}),
    "soft cap": ({"logit_cap": 5.0}, {"logits_soft_cap": 5.0}),
    "encoder": ({"attn_type": AttentionType.ENCODER_ONLY}, {"causal": False}),
    "image tokens": ({"attn_type": AttentionType.DECODER_BIDIRECTIONAL}, {}),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("kind", LAYERS)
def test_mixed_step(kind: str, page: int, device: str) -> None:
    arguments, mask = LAYERS[kind]
    step = Step(Server(device, page), make_layer(**arguments))
    step.check(step.run(), Mask(**{"causal": True, **mask}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_of_any_dtype(dtype: torch.dtype, device: str) -> None:
    step = Step(Server(device), make_layer())
    sinks = (torch.arange(HEADS) / 2).to(dtype).to(device)
    step.check(step.run(sinks=sinks), Mask(causal=True, sinks=sinks.cpu().float()))


@pytest.mark.parametrize("device", DEVICES)
def test_fp8_cache_with_scales(device: str) -> None:
    layer = make_layer()
    layer.k_scale, layer.v_scale = (torch.tensor(s, device=device) for s in (0.5, 2.0))
    layer.k_scale_float, layer.v_scale_float = 0.5, 2.0
    step = Step(Server(device, kv_dtype=E4M3), layer)
    step.check(step.run(), Mask(causal=True), k_scale=0.5, v_scale=2.0)


@pytest.mark.parametrize("device", DEVICES)
def test_values_of_another_size(device: str) -> None:
    step = Step(Server(device, v_dim=32), make_layer(v_head_dim=32))
    step.check(step.run(), Mask(causal=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page", [1, 16])
def test_window_pool_and_full_pool_in_one_step(page: int, device: str) -> None:
    server = Server(device, page, window_layers=(1,))
    for layer, window_left in (
        (make_layer(0), -1),
        (make_layer(1, sliding_window_size=23), 23),
    ):
        step = Step(server, layer)
        step.check(step.run(), Mask(causal=True, window_left=window_left))


@pytest.mark.parametrize("device", DEVICES)
def test_result_goes_where_the_batch_wants_it(device: str) -> None:
    step = Step(Server(device), make_layer())
    given = torch.empty_like(step.q.contiguous())
    step.batch._attn_output = given
    assert step.run() is given
    step.check(given, Mask(causal=True))
    step.batch._attn_output = given[:-1]  # left over from another step
    assert step.run().data_ptr() != given.data_ptr()


@pytest.mark.parametrize("device", DEVICES)
def test_cache_is_written_only_if_asked(device: str) -> None:
    step = Step(Server(device), make_layer())
    step.write(step.batch.out_cache_loc, step.k, step.v)
    step.k, step.v = torch.full_like(step.k, 9), torch.full_like(step.v, 9)
    step.check(step.run(save_kv_cache=False), Mask(causal=True))
    step.server.backend.init_forward_metadata(step.batch)
    shared = step.server.backend.forward(step.q, None, None, step.layer, step.batch)
    step.check(shared, Mask(causal=True))


def test_steps_without_tokens() -> None:
    step = Step(Server("cpu"), make_layer())
    backend = step.server.backend
    step.batch.forward_mode = ForwardMode.IDLE
    backend.init_forward_metadata(step.batch)
    assert backend.forward_metadata is None
    assert backend.forward(step.q[:0], None, None, step.layer, step.batch).shape == (0, HEADS * DIM)
    step.batch.forward_mode, step.batch.batch_size = ForwardMode.EXTEND, 0
    backend.init_forward_metadata(step.batch)
    assert backend.forward(step.q[:0], None, None, step.layer, step.batch).shape == (0, HEADS * DIM)


def test_deterministic_mode_does_not_depend_on_batch_mates() -> None:
    server = Server("cpu", enable_deterministic_inference=True)
    step = Step(server, make_layer())
    assert server.backend.init_forward_metadata(step.batch) is None
    assert server.backend.forward_metadata.split_tokens > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"is_cross_attention": True}, "is_cross_attention must be False; got True"),
        (
            {"attn_type": AttentionType.ENCODER_ONLY, "sliding_window_size": 7},
            "sliding_window_size must be -1 in an encoder; got 7",
        ),
        ({"logit_cap": 1.0, "logit_capping_method": "linear"}, "must be tanh; got linear"),
    ],
)
def test_layers_we_refuse(arguments: dict[str, Any], words: str) -> None:
    step = Step(Server("cpu"), make_layer(**arguments))
    with pytest.raises(UnsupportedError, match=words):
        step.run()


def test_arguments_we_refuse() -> None:
    step = Step(Server("cpu"), make_layer())
    with pytest.raises(UnsupportedError, match="layer 0: fi_backend takes no k_rope, q_rope"):
        step.run(q_rope=step.q, k_rope=step.k, cos_sin_cache=None)
