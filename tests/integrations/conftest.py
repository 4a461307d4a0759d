"""Fixtures for adapter tests: the engine's real classes, imported once."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="session")
def vllm() -> Callable[[str], ModuleType]:
    """Import a module of vLLM by its name below `vllm`; skip where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")

    def load(name: str) -> ModuleType:
        with warnings.catch_warnings():  # the engine's and its dependencies' own
            warnings.simplefilter("ignore")
            return importlib.import_module(f"vllm.{name}")

    load("config")
    return load


@pytest.fixture
def engine_config(vllm: Callable[[str], ModuleType]) -> Callable[[str | None], Any]:
    """Return a context manager that makes a configuration with this backend the current one."""
    config = vllm("config")

    def using(backend: str | None) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attention = config.AttentionConfig(backend=backend)
            return config.set_current_vllm_config(config.VllmConfig(attention_config=attention))

    return using
