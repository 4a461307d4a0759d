"""vLLM plugin: `--attention-backend flashinfer` (any case) and `custom` run on fi_backend.

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it in every
process it starts: API server, engine core, workers. (`VLLM_PLUGINS`, if set, must name
`fi_backend`, or vLLM never calls us.) The parts, in the order a request meets them:

    registration.py      puts our classes into vLLM's backend table, undoes it on failure
    selection.py         FLASHINFER is ours where it was asked for by name, stock elsewhere
    cpu_platform.py      lets vLLM's CPU platform hear the user's choice
    backend.py           what we support, as vLLM asks it
    builder.py           once a step: engine metadata -> batch (metadata.py) -> plans, in memory
                         that was reserved before the first step (reservation.py)
    impl.py              once a layer: write the cache (kv_cache.py), run attention
    context_parallel.py  the same where ranks share a cache
    worker_extension.py  counters over RPC
"""

from __future__ import annotations

import logging

from fi_backend import env

__all__ = ["register"]

# A child of vLLM's own logger: lines of other loggers never reach an engine's console.
_logger = logging.getLogger("vllm.fi_backend")


def register() -> None:
    """Register with the vLLM of this process; a second call changes nothing.

    A vLLM version outside the tested range, `FI_BACKEND_DISABLE=1` and any failure leave vLLM as
    it was; each says so in one line. With `FI_BACKEND_STRICT=1` the first and the last end the
    engine's start.

    Raises:
        RuntimeError: something is wrong, and `FI_BACKEND_STRICT` is set.
    """
    try:
        from fi_backend.integrations.vllm.registration import register_backends

        register_backends(_logger)
    except Exception as error:  # an exception here would end the engine
        message = f"fi_backend: not registered ({type(error).__name__}: {error})"
        if env.STRICT.get():
            raise RuntimeError(message) from error
        _logger.error("%s; vLLM keeps its own attention backends", message)
