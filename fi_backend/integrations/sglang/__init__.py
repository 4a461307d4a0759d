"""SGLang plugin: `--attention-backend flashinfer` and `fi_backend` run on fi_backend.

SGLang finds `activate` through the entry point group `sglang.srt.plugins` and calls it in every
process it starts. (`SGLANG_PLUGINS`, if set, must name `fi_backend`, or SGLang never calls us.) The
parts, in the order a request meets them:

    registration.py   puts our factories into SGLang's table of attention backends, and its hooks
    factory.py        makes a backend, or says why it cannot
    backend.py        once a step: plans; once a layer: write the cache (kv_cache.py), run attention
    metadata.py       SGLang's batch -> query rows and plans
    page_tables.py    SGLang's token table -> page tables
    graphs.py         the steps that CUDA graphs were captured with
    verify_mask.py    which drafts of a speculative step see which
    draft.py          the backends of a draft model's steps
    layer.py          one RadixAttention as an AttentionSpec
"""

from __future__ import annotations

import logging

from fi_backend import env

__all__ = ["activate"]

_logger = logging.getLogger(__name__)


def activate() -> None:
    """Register with the SGLang of this process; a second call changes nothing.

    SGLang goes on without a plugin that fails. So does this one, in one line, unless
    `FI_BACKEND_STRICT=1` says that the process must rather end.

    Raises:
        SystemExit: something is wrong, and `FI_BACKEND_STRICT` is set.
    """
    try:
        from fi_backend.integrations.sglang.registration import register_backends

        register_backends(_logger)
    except Exception as error:
        message = f"fi_backend: not registered ({type(error).__name__}: {error})"
        if env.STRICT.get():
            raise SystemExit(message) from error  # SGLang catches every Exception
        _logger.error("%s; SGLang keeps its own attention backends", message)
