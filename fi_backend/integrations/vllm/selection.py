"""What the configuration that vLLM works on says of us: FLASHINFER is us where it was asked for.

vLLM tries FLASHINFER unasked too (first on Blackwell, second on Hopper), through the same table of
backends. So the table points to `FlashInferBackend` of this module, an attribute that is looked up
anew each time: our class if the engine's configuration names FLASHINFER, vLLM's own otherwise.
"""

from __future__ import annotations

import importlib
from typing import Any

from fi_backend import env

__all__ = ["asked_by_name", "caches_prefixes", "serves_unasked"]


def asked_by_name(name: str) -> bool:
    """Whether the configuration that vLLM works on now names this attention backend."""
    from vllm.config.vllm import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    if config is None:
        return False
    attention = config.attention_config
    chosen = [attention.backend, *(getattr(attention, "backend_per_kind", None) or {}).values()]
    return any(backend is not None and backend.name == name for backend in chosen)


def caches_prefixes() -> bool:
    """Whether requests of the engine that vLLM works on may have pages in common."""
    from vllm.config.vllm import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    return config is not None and bool(config.cache_config.enable_prefix_caching)


def serves_unasked() -> bool:
    """Whether the user opted in to being served without naming a backend."""
    return env.AUTO.get()


def __getattr__(name: str) -> Any:
    if name != "FlashInferBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if asked_by_name("FLASHINFER") or serves_unasked():
        from fi_backend.integrations.vllm.backend import FIAttentionBackend

        return FIAttentionBackend
    return importlib.import_module("vllm.v1.attention.backends.flashinfer").FlashInferBackend
