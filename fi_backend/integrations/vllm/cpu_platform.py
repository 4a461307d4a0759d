"""Let vLLM's CPU platform hear the user's choice of attention backend.

Its selector returns CPU_ATTN whatever was asked for, so this is the one method we wrap. Everything
that was not asked of us goes to the original.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from fi_backend.errors import UnsupportedError
from fi_backend.integrations.vllm.selection import serves_unasked

__all__ = ["install"]

_logger = logging.getLogger("vllm.fi_backend")
_METHOD = "get_attn_backend_cls"
_SERVED = {"FLASHINFER": "FIAttentionBackend", "CUSTOM": "FICustomBackend"}


def install(platform: type) -> Callable[[], None]:
    """Wrap the platform's backend selector; return a function that takes the wrapper off again."""
    had_own = _METHOD in vars(platform)
    original = getattr(platform, _METHOD).__func__
    if hasattr(original, "_fi_backend_original"):
        return lambda: None

    def select(
        cls: type, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        path = _our_class(selected_backend, attn_selector_config)
        if path is not None:
            return path
        return original(cls, selected_backend, attn_selector_config, num_heads)

    select._fi_backend_original = original  # type: ignore[attr-defined]
    setattr(platform, _METHOD, classmethod(select))

    def remove() -> None:
        if had_own:
            setattr(platform, _METHOD, classmethod(original))
        else:
            delattr(platform, _METHOD)

    return remove


def _our_class(selected: Any, config: Any) -> str | None:
    """Return the path of our class if it is to serve a layer, None if vLLM's own is."""
    if config.use_mla or config.use_sparse:
        return None
    unasked = selected is None and serves_unasked()
    if not unasked and (selected is None or selected.name not in _SERVED or not _is_ours(selected)):
        return None

    from fi_backend.integrations.vllm import backend

    name = "FLASHINFER" if unasked else selected.name
    ours = getattr(backend, _SERVED[name])
    reasons = ours.validate_configuration(device_capability=None, **config._asdict())
    if reasons and unasked:
        _logger.info("fi_backend: standing aside: %s", "; ".join(reasons))
        return None
    if reasons:
        raise UnsupportedError(
            f"attention backend {name} (fi_backend) cannot serve this model: {'; '.join(reasons)}. "
            f"Start without --attention-backend to use vLLM's own"
        )
    _logger.info("fi_backend: serving attention as %s", name)
    return f"{ours.__module__}.{ours.__qualname__}"


def _is_ours(selected: Any) -> bool:
    return selected.is_overridden() and selected.get_path().startswith(__package__ + ".")
