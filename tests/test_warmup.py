"""Which kernels a model's config asks for."""

from __future__ import annotations

from typing import Any

import pytest

from fi_backend.warmup import specs_for_model

LLAMA: dict[str, Any] = {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "torch_dtype": "bfloat16",
}


def names(config: dict[str, Any]) -> set[str]:
    return {spec.name for spec in specs_for_model(config)}


def test_a_llama_needs_one_module_of_each_family() -> None:
    families = {name.split("_")[0] for name in names(LLAMA)}
    assert families == {
        "plan", "decode", "prefill", "append", "merge", "norm", "rope", "activation"
    }  # fmt: skip
    assert any("bf16" in name and "d128x128" in name for name in names(LLAMA))


def test_the_cache_dtype_and_nested_configs_are_followed() -> None:
    assert any("e5m2" in name for name in names(LLAMA | {"kv_cache_dtype": "fp8_e5m2"}))
    nested = {"text_config": LLAMA | {"head_dim": 256}, "hidden_size": 7}
    assert any("d256x256" in name for name in names(nested))


def test_every_head_size_of_a_hybrid_model_is_built() -> None:
    hybrid = names(LLAMA | {"head_dim": 64, "global_head_dim": 128})
    assert sum(name.startswith("decode") for name in hybrid) == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"torch_dtype": "bfloat16"}, "head size is unknown"),
        (LLAMA | {"torch_dtype": "int8"}, "dtype must be one of .*int8"),
        (LLAMA | {"kv_cache_dtype": "nvfp4"}, "kv_cache_dtype must be one of .*nvfp4"),
        (LLAMA | {"kv_lora_rank": 512}, "latent attention"),
        (LLAMA | {"head_dim": 100}, "head_dim_qk must be a multiple of 8"),
    ],
)
def test_what_cannot_be_served_is_said(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        specs_for_model(config)
