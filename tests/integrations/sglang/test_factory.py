"""Which models we serve, and who serves the others."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from sglang_step import Server

from fi_backend.errors import UnsupportedError
from fi_backend.integrations.sglang.backend import FIAttnBackend
from fi_backend.integrations.sglang.factory import factory


def stock(model_runner: Any) -> str:
    return "stock"


def test_says_that_it_serves(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        backend = factory(stock)(Server("cpu").runner)
    assert isinstance(backend, FIAttnBackend)
    assert [line for line in caplog.messages if line.startswith("fi_backend")] == [
        "fi_backend 0.1.0 serves attention on cpu"
    ]


@pytest.mark.parametrize(
    ("where", "name", "value", "words"),
    [
        ("", "use_mla_backend", True, "no support for multi-head latent attention"),
        ("model_config", "is_encoder_decoder", True, "no support for cross attention"),
        ("", "attention_chunk_size", 8192, "no support for chunked local attention"),
        ("server_args", "dllm_algorithm", "x", "no support for diffusion language models"),
        ("server_args", "enable_mis", True, "no support for multi-item scoring"),
        ("server_args", "dcp_size", 2, "no support for context parallelism"),
        ("", "attn_cp_size", 2, "no support for context parallelism"),
        (
            "token_to_kv_pool",
            "quant_method",
            SimpleNamespace(name="nvfp4"),
            "a cache quantised by blocks",
        ),
        ("token_to_kv_pool_allocator", "translate_kv_loc", print, "a unified memory pool"),
    ],
)
def test_what_we_refuse_goes_to_the_stock_backend_with_a_warning(
    where: str,
    name: str,
    value: Any,
    words: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = Server("cpu").runner
    setattr(getattr(runner, where) if where else runner, name, value)
    assert factory(stock)(runner) == "stock"
    assert any(words in line for line in caplog.messages)
    with pytest.raises(UnsupportedError, match=words):
        factory(None)(runner)
    monkeypatch.setenv("FI_BACKEND_STRICT", "1")
    with pytest.raises(UnsupportedError, match=words):
        factory(stock)(runner)
