"""register(): what it changes in vLLM, that it can be called twice, and how it fails."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fi_backend.integrations.vllm import register

Load = Callable[[str], ModuleType]
LOGGER = "vllm.fi_backend"


@pytest.fixture
def table(vllm: Load) -> Iterator[Any]:
    """vLLM's enum of attention backends; its overrides and the platform's hook as before."""
    registry = vllm("v1.attention.backends.registry")
    platform = type(vllm("platforms").current_platform)
    overrides = dict(registry._ATTN_OVERRIDES)
    method = vars(platform)["get_attn_backend_cls"]
    original = getattr(method.__func__, "_fi_backend_original", None)
    registry._ATTN_OVERRIDES.clear()
    if original is not None:
        platform.get_attn_backend_cls = classmethod(original)
    yield registry.AttentionBackendEnum
    registry._ATTN_OVERRIDES.clear()
    registry._ATTN_OVERRIDES.update(overrides)
    platform.get_attn_backend_cls = method


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What our logger says."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(LOGGER)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield said
    logger.setLevel(level)
    logger.removeHandler(handler)


def selector(vllm: Load) -> Any:
    return type(vllm("platforms").current_platform).get_attn_backend_cls.__func__


def test_registers_both_names_once(vllm: Load, table: Any) -> None:
    register()
    assert table.FLASHINFER.is_overridden()
    assert table.CUSTOM.get_class().get_name() == "CUSTOM"
    assert not table.CPU_ATTN.is_overridden()
    hook = selector(vllm)
    register()
    assert selector(vllm) is hook


@pytest.mark.parametrize("version", ["0.24.9", "0.34.0", "1.0.0", "dev"])
def test_unknown_version_is_left_alone(
    version: str,
    vllm: Load,
    table: Any,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import vllm as package

    hook = selector(vllm)
    monkeypatch.setattr(package, "__version__", version)
    register()
    assert not table.FLASHINFER.is_overridden()
    assert not table.CUSTOM.is_overridden()
    assert selector(vllm) is hook
    assert lines == [
        f"fi_backend: standing aside: vLLM {version} is outside the tested range 0.25 to 0.33"
    ]


def test_disabled_by_variable(
    table: Any, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FI_BACKEND_DISABLE", "1")
    register()
    assert not table.FLASHINFER.is_overridden()
    assert lines == ["fi_backend: standing aside because FI_BACKEND_DISABLE is set"]


def test_failure_leaves_the_engine_as_it_was(
    vllm: Load, table: Any, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fi_backend.integrations.vllm import cpu_platform

    def broken(platform: type) -> None:
        raise RuntimeError("the platform changed")

    registry = vllm("v1.attention.backends.registry")
    registry.register_backend(table.CUSTOM, "somebody.elses.Backend")
    hook = selector(vllm)
    monkeypatch.setattr(cpu_platform, "install", broken)
    register()
    assert not table.FLASHINFER.is_overridden()
    assert table.CUSTOM.get_path() == "somebody.elses.Backend"
    assert selector(vllm) is hook
    assert lines == [
        "fi_backend: not registered (RuntimeError: the platform changed); "
        "vLLM keeps its own attention backends"
    ]


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("0.24.9", "vLLM 0.24.9 is outside the tested range 0.25 to 0.33"),
        ("0.32.0", "the platform changed"),
    ],
)
def test_strict_mode_ends_the_start(
    version: str, words: str, vllm: Load, table: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an engine would be served by the stock backend under the name that was asked for."""
    import vllm as package

    from fi_backend.integrations.vllm import cpu_platform

    def broken(platform: type) -> None:
        raise RuntimeError("the platform changed")

    monkeypatch.setenv("FI_BACKEND_STRICT", "1")
    monkeypatch.setattr(package, "__version__", version)
    monkeypatch.setattr(cpu_platform, "install", broken)
    with pytest.raises(RuntimeError, match=rf"fi_backend: not registered \(RuntimeError: {words}"):
        register()
    assert not table.FLASHINFER.is_overridden()


def test_bad_variable_is_one_line(
    table: Any, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FI_BACKEND_DISABLE", "perhaps")
    register()
    assert not table.FLASHINFER.is_overridden()
    assert len(lines) == 1
    assert "FI_BACKEND_DISABLE='perhaps' is not allowed" in lines[0]


@pytest.mark.parametrize(
    ("is_cuda", "is_installed", "said", "result"),
    [
        (True, False, None, "0"),
        (True, False, "1", "1"),
        (True, True, None, None),
        (False, False, None, None),
    ],
)
def test_the_sampler_is_told_where_flashinfer_is_missing(
    is_cuda: bool,
    is_installed: bool,
    said: str | None,
    result: str | None,
    vllm: Load,
    table: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On CUDA, and nowhere else, vLLM's sampler would import it, and end the engine's start."""
    from fi_backend.integrations.vllm import registration

    variable = "VLLM_USE_FLASHINFER_SAMPLER"
    monkeypatch.setenv(variable, "")  # so that it is as before in the end
    monkeypatch.delenv(variable)
    if said is not None:
        monkeypatch.setenv(variable, said)
    platform = vllm("platforms").current_platform
    monkeypatch.setattr(platform, "is_cpu", lambda: False)
    monkeypatch.setattr(platform, "is_cuda", lambda: is_cuda)
    monkeypatch.setattr(
        registration,
        "importlib",
        SimpleNamespace(
            util=SimpleNamespace(find_spec=lambda _: object() if is_installed else None)
        ),
    )
    register()
    assert table.FLASHINFER.is_overridden()
    assert os.environ.get(variable) == result
