"""AttentionSpec: defaults, geometry, and that every limit is named."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fi_backend import AttentionSpec, supports

SPEC = AttentionSpec(num_qo_heads=8, num_kv_heads=2, head_dim_qk=64, q_dtype=torch.bfloat16)


def test_defaults_follow_from_the_query() -> None:
    assert SPEC.head_dim_vo == 64
    assert SPEC.kv_dtype == SPEC.o_dtype == torch.bfloat16
    assert SPEC.sm_scale == 0.125
    assert SPEC.group_size == 4
    assert supports(SPEC) is None


def test_layers_that_differ_outside_the_geometry_share_it() -> None:
    other = dataclasses.replace(SPEC, logits_soft_cap=30.0, sm_scale=1.0, sinks=True)
    assert other != SPEC
    assert other.geometry == SPEC.geometry
    assert hash(other.geometry) == hash(SPEC.geometry)
    assert dataclasses.replace(SPEC, window_left=5).geometry != SPEC.geometry


def test_a_custom_mask_takes_the_place_of_the_causal_one() -> None:
    assert not dataclasses.replace(SPEC, custom_mask=True).geometry.causal


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_qo_heads": 7}, ("num_qo_heads=7", "multiple of num_kv_heads")),
        ({"num_kv_heads": 0}, ("num_kv_heads=0",)),
        ({"head_dim_qk": 60}, ("head_dim_qk", "multiple of 8", "60")),
        ({"head_dim_vo": 520}, ("head_dim_vo", "512", "520")),
        ({"q_dtype": torch.float64}, ("q_dtype", "torch.bfloat16", "torch.float64")),
        ({"kv_dtype": torch.int8}, ("kv_dtype", "torch.float8_e4m3fn", "torch.int8")),
        ({"o_dtype": torch.float8_e5m2}, ("o_dtype", "torch.float8_e5m2")),
        ({"page_size": 0}, ("page_size", "0")),
        ({"window_left": -2}, ("window_left", "-2")),
        ({"sm_scale": float("nan")}, ("sm_scale", "nan")),
        ({"logits_soft_cap": -1.0}, ("logits_soft_cap", "-1.0")),
        ({"logits_soft_cap": float("nan")}, ("logits_soft_cap", "nan")),
        ({"rope_theta": -1.0}, ("rope_theta", "-1.0")),
        ({"rope_theta": float("nan")}, ("rope_theta", "nan")),
        ({"rope_theta": 1e4, "rope_scale": float("inf")}, ("rope_scale", "inf")),
    ],
)
def test_every_limit_is_named(change: dict[str, object], words: tuple[str, ...]) -> None:
    reason = supports(dataclasses.replace(SPEC, **change))
    assert reason is not None
    for word in words:
        assert word in reason


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q_dtype": torch.float32}, ("q_dtype", "torch.float16", "cuda", "torch.float32")),
        ({"kv_dtype": torch.float16}, ("kv_dtype", "torch.bfloat16", "cuda", "torch.float16")),
        ({"head_dim_qk": 72}, ("head_dim_qk", "multiple of 32", "cuda", "72")),
        ({"head_dim_vo": 288}, ("head_dim_vo", "256", "cuda", "288")),
        ({"rope_theta": 1e4}, ("rope_theta", "cuda", "10000.0")),
    ],
)
def test_limits_of_cuda_are_named(change: dict[str, object], words: tuple[str, ...]) -> None:
    assert supports(SPEC, "cuda") is None
    reason = supports(dataclasses.replace(SPEC, **change), "cuda")
    assert reason is not None
    for word in words:
        assert word in reason


@pytest.mark.parametrize(
    "change",
    [{"num_qo_heads": 8.0}, {"head_dim_vo": 64.0}, {"page_size": "16"}, {"window_left": 3.5}],
)
def test_counts_are_integers(change: dict[str, object]) -> None:
    ((name, value),) = change.items()
    with pytest.raises(TypeError, match=f"{name} must be an int; got {value!r}"):
        dataclasses.replace(SPEC, **change)


def test_integers_of_numpy_are_integers() -> None:
    other = dataclasses.replace(SPEC, num_qo_heads=np.int64(8), page_size=np.int32(1))
    assert other.geometry is SPEC.geometry
    assert type(other.num_qo_heads) is int


def test_other_devices_are_refused() -> None:
    assert supports(SPEC, "mps") == "device must be cpu or cuda; got mps"
