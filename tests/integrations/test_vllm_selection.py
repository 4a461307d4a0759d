"""Who serves: us where we were asked by name, the engine's own backend everywhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fi_backend.errors import UnsupportedError
from fi_backend.integrations.vllm import register, selection

Load = Callable[[str], ModuleType]
Using = Callable[[str | None], Any]


@pytest.fixture(autouse=True)
def _registered(vllm: Load) -> Iterator[None]:
    register()
    selector = vllm("v1.attention.selector")
    selector._cached_get_attn_backend.cache_clear()
    yield
    selector._cached_get_attn_backend.cache_clear()


def choose(vllm: Load, **arguments: Any) -> type:
    arguments = {"head_size": 64, "dtype": torch.float32, "kv_cache_dtype": "auto", **arguments}
    return vllm("v1.attention.selector").get_attn_backend(**arguments)


@pytest.mark.parametrize(
    ("asked", "name"),
    [("flashinfer", "FLASHINFER"), ("FlashInfer", "FLASHINFER"), ("custom", "CUSTOM")],
)
def test_asked_by_name(asked: str, name: str, vllm: Load, engine_config: Using) -> None:
    with engine_config(asked):
        chosen = choose(vllm)
    assert chosen.__module__ == "fi_backend.integrations.vllm.backend"
    assert chosen.get_name() == name


@pytest.mark.parametrize("asked", [None, "auto", "cpu_attn", "flash_attn", "triton_attn"])
def test_not_asked(asked: str | None, vllm: Load, engine_config: Using) -> None:
    with engine_config(asked):
        assert choose(vllm).get_name() == "CPU_ATTN"


def test_opting_in_to_being_served_unasked(
    vllm: Load, engine_config: Using, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FI_BACKEND_AUTO", "1")
    with engine_config(None):
        assert choose(vllm).get_name() == "FLASHINFER"
        assert choose(vllm, head_size=36).get_name() == "CPU_ATTN"
    with engine_config("cpu_attn"):
        assert choose(vllm).get_name() == "CPU_ATTN"


def test_what_we_cannot_serve_is_refused_by_name(vllm: Load, engine_config: Using) -> None:
    with (
        engine_config("flashinfer"),
        pytest.raises(UnsupportedError, match=r"cannot serve this model: head_dim_qk .* got 36"),
    ):
        choose(vllm, head_size=36)


def test_answers_on_a_gpu(vllm: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM's CUDA platform asks; there is no GPU here."""
    from fi_backend.integrations.vllm.backend import FIAttentionBackend

    platforms, selector = vllm("platforms"), vllm("v1.attention.selector")
    monkeypatch.setattr(type(platforms.current_platform), "device_type", "cuda")

    def reasons(capability: tuple[int, int] = (9, 0), **arguments: Any) -> list[str]:
        asked = {
            "head_size": 128,
            "dtype": torch.bfloat16,
            "kv_cache_dtype": "auto",
            "block_size": 16,
            **arguments,
        }
        config = selector.AttentionSelectorConfig(**asked)._asdict()
        device_capability = vllm("platforms.interface").DeviceCapability(*capability)
        return FIAttentionBackend.validate_configuration(
            device_capability=device_capability, **config
        )

    for served in (
        {},
        {"kv_cache_dtype": "fp8"},
        {"kv_cache_dtype": "fp8_e5m2", "dtype": torch.float16},
        {"has_sink": True, "use_non_causal": True, "block_size": None},
        {"capability": (8, 0)},
        {"capability": (12, 0)},
    ):
        assert reasons(**served) == []
    for refused, why in (
        ({"capability": (7, 5)}, "compute capability not supported"),
        ({"dtype": torch.float32}, "q_dtype must be one of torch.bfloat16, torch.float16 on cuda"),
        ({"head_size": 80}, "head_dim_qk must be a multiple of 32 up to 256 on cuda; got 80"),
        ({"block_size": 8}, "block_size not supported"),
    ):
        assert any(reason.startswith(why) for reason in reasons(**refused))


def test_mla_stays_with_the_engine(vllm: Load, engine_config: Using) -> None:
    with engine_config("flashinfer"):
        assert choose(vllm, use_mla=True).is_mla()


@pytest.mark.parametrize("feature", ["has_sink", "has_sliding_window"])
def test_features_do_not_send_us_away(feature: str, vllm: Load, engine_config: Using) -> None:
    with engine_config("flashinfer"):
        assert choose(vllm, **{feature: True}).get_name() == "FLASHINFER"


def test_unasked_table_entry_is_the_engines_own_class(
    vllm: Load, engine_config: Using, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA vLLM tries FLASHINFER unasked: the table must then lead to its own class."""
    stock = type("FlashInferBackend", (), {})
    module = "vllm.v1.attention.backends.flashinfer"
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(FlashInferBackend=stock))
    table = vllm("v1.attention.backends.registry").AttentionBackendEnum
    assert table.FLASHINFER.get_class() is stock
    for asked in (None, "flash_attn", "custom"):
        with engine_config(asked):
            assert table.FLASHINFER.get_class() is stock
    with engine_config("flashinfer"):
        assert table.FLASHINFER.get_class().__module__.startswith("fi_backend")
    monkeypatch.setenv("FI_BACKEND_AUTO", "1")
    with engine_config(None):
        assert table.FLASHINFER.get_class().__module__.startswith("fi_backend")


def test_unasked_table_entry_without_the_flashinfer_package(
    vllm: Load, engine_config: Using
) -> None:
    """Its import error is what an engine without our package meets, and handles."""
    if sys.modules.get("flashinfer") is not None:
        pytest.skip("the flashinfer package is installed")
    table = vllm("v1.attention.backends.registry").AttentionBackendEnum
    with engine_config(None), pytest.raises(ImportError):
        table.FLASHINFER.get_class()


def test_a_kind_of_layer_can_ask(vllm: Load, engine_config: Using) -> None:
    config = vllm("config")
    attention = config.AttentionConfig(backend_per_kind={"sliding_window": "FLASHINFER"})
    with config.set_current_vllm_config(config.VllmConfig(attention_config=attention)):
        assert selection.asked_by_name("FLASHINFER")
        assert choose(vllm, has_sliding_window=True).get_name() == "FLASHINFER"
        assert choose(vllm).get_name() == "CPU_ATTN"


def test_module_has_no_other_lazy_names() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Other'"):
        selection.Other  # noqa: B018
