"""Put our classes into vLLM's table of attention backends, or leave it untouched."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Callable
from typing import Any

from fi_backend import env
from fi_backend.integrations.vllm import cpu_platform, selection

__all__ = ["CUSTOM_PATH", "FLASHINFER_PATH", "register_backends"]

FLASHINFER_PATH = f"{selection.__name__}.FlashInferBackend"
CUSTOM_PATH = "fi_backend.integrations.vllm.backend.FICustomBackend"

_OLDEST_TESTED = (0, 25)
_NEWEST_TESTED = (0, 33)
_SAMPLER_VARIABLE = "VLLM_USE_FLASHINFER_SAMPLER"


def register_backends(logger: logging.Logger) -> None:
    """Register FLASHINFER, CUSTOM and the CPU platform hook; undo all of it if a step fails.

    Raises:
        RuntimeError: `FI_BACKEND_STRICT` is set and this vLLM was not tested.
    """
    import vllm

    if env.DISABLE.get():
        logger.info("fi_backend: standing aside because %s is set", env.DISABLE.source())
        return
    if not _is_tested(vllm.__version__):
        message = (
            f"vLLM {vllm.__version__} is outside the tested range "
            f"{_text(_OLDEST_TESTED)} to {_text(_NEWEST_TESTED)}"
        )
        if env.STRICT.get():
            raise RuntimeError(message)
        logger.warning("fi_backend: standing aside: %s", message)
        return
    undo: list[Callable[[], None]] = []
    try:
        _register(undo)
    except Exception:
        for step in reversed(undo):
            step()
        raise


def _is_tested(version: str) -> bool:
    match = re.match(r"(\d+)\.(\d+)\.", version)
    if match is None:
        return False
    return _OLDEST_TESTED <= (int(match[1]), int(match[2])) <= _NEWEST_TESTED


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _register(undo: list[Callable[[], None]]) -> None:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for backend, path in (
        (AttentionBackendEnum.FLASHINFER, FLASHINFER_PATH),
        (AttentionBackendEnum.CUSTOM, CUSTOM_PATH),
    ):
        if backend.is_overridden() and backend.get_path() == path:
            continue
        undo.append(_restore_override(backend))
        register_backend(backend, path)
    if current_platform.is_cpu():
        undo.append(cpu_platform.install(type(current_platform)))
    elif current_platform.is_cuda():
        _spare_sampler(undo)


def _spare_sampler(undo: list[Callable[[], None]]) -> None:
    """Keep vLLM's sampler from importing flashinfer where it is not installed.

    To 0.33 it does so on CUDA whatever attention runs on, and the engine's start ends there. So no
    engine that would start without us is changed.
    """
    if importlib.util.find_spec("flashinfer") is None and _SAMPLER_VARIABLE not in os.environ:
        undo.append(_unset_sampler_variable)
        os.environ[_SAMPLER_VARIABLE] = "0"


def _unset_sampler_variable() -> None:
    os.environ.pop(_SAMPLER_VARIABLE, None)


def _restore_override(backend: Any) -> Callable[[], None]:
    from vllm.v1.attention.backends.registry import register_backend

    if not backend.is_overridden():
        return backend.clear_override
    earlier = backend.get_path()

    def restore() -> None:
        register_backend(backend, earlier)

    return restore
