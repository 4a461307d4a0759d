"""Make our backend for a model, or say why it cannot be."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import fi_backend
from fi_backend import env
from fi_backend.errors import UnsupportedError

__all__ = ["create_backend", "factory", "refusal"]

_logger = logging.getLogger(__name__)

Factory = Callable[[Any], Any]


def refusal(model_runner: Any) -> str | None:
    """Say why we cannot serve a ModelRunner, or None if its layers are all there is to ask."""
    arguments = model_runner.server_args
    reasons = {
        "multi-head latent attention": model_runner.use_mla_backend,
        "cross attention": model_runner.model_config.is_encoder_decoder,
        "chunked local attention": getattr(model_runner, "attention_chunk_size", None) is not None,
        "diffusion language models": getattr(arguments, "dllm_algorithm", None) is not None,
        "multi-item scoring": getattr(arguments, "enable_mis", False),
        "context parallelism": getattr(arguments, "dcp_size", 1) > 1
        or getattr(model_runner, "attn_cp_size", 1) > 1,
        "a cache quantised by blocks": _is_block_quantised(model_runner.token_to_kv_pool),
        "a unified memory pool": hasattr(
            model_runner.token_to_kv_pool_allocator, "translate_kv_loc"
        ),
    }
    found = [what for what, present in reasons.items() if present]
    return f"no support for {', '.join(found)}" if found else None


def _is_block_quantised(pool: Any) -> bool:
    """Whether a cache is more than tokens in the dtype that it names, as FP4 caches are."""
    method = getattr(pool, "get_kv_cache_quant_method", lambda: None)()
    return getattr(method, "name", "unquantized") != "unquantized"


def create_backend(model_runner: Any) -> Any:
    """Return our backend for a ModelRunner.

    Raises:
        UnsupportedError: we cannot serve its model; the message says why.
    """
    reason = refusal(model_runner)
    if reason is not None:
        raise UnsupportedError(f"fi_backend: {reason}; start with another --attention-backend")
    from fi_backend.integrations.sglang.backend import FIAttnBackend

    backend = FIAttnBackend(model_runner)
    _logger.info("fi_backend %s serves attention on %s", fi_backend.__version__, backend.device)
    return backend


def factory(original: Factory | None) -> Factory:
    """Return a factory for SGLang's table.

    Args:
        original: SGLang's own factory of the name, which gets the models that we cannot serve, with
            a warning that says why; None, or `FI_BACKEND_STRICT=1`, refuses them.
    """

    def create(model_runner: Any) -> Any:
        try:
            return create_backend(model_runner)
        except UnsupportedError as error:
            if original is None or env.STRICT.get():
                raise
            _logger.warning("%s. SGLANG'S OWN BACKEND SERVES THIS MODEL", error)
            return original(model_runner)

    return create
