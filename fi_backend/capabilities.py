"""Ask which GPUs and backends serve a public call, as FlashInfer's calls are asked.

    fi_backend.rmsnorm.is_compute_capability_supported(90)
    fi_backend.BatchPrefillWithPagedKVCacheWrapper.is_backend_supported("fa3", 90)

Every call that runs a kernel has both. What one attention layer may look like is
:func:`fi_backend.supports`'s to say.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from fi_backend._arguments import check_backend
from fi_backend.errors import UnsupportedError
from fi_backend.torch_ops import OLDEST_COMPUTE_CAPABILITY

__all__ = ["add_queries", "is_backend_supported", "is_compute_capability_supported"]

# On a GPU made of torch's own operations, which run on every one.
_WITHOUT_KERNEL = ("get_seq_lens", "packbits", "segment_packbits")


def is_compute_capability_supported(call: str, cc: int) -> bool:
    """Return whether a public call takes tensors on GPUs of a compute capability.

    Args:
        call: public name, as "rmsnorm" or "BatchAttention".
        cc: 10 * major + minor, as 90.

    Raises:
        ValueError: there is no such public name.
    """
    _public(call)
    return call in _WITHOUT_KERNEL or cc >= OLDEST_COMPUTE_CAPABILITY


def is_backend_supported(call: str, backend: str, cc: int | None = None) -> bool:
    """Return whether a public call may be asked for a backend.

    Args:
        call: public name, as "rmsnorm" or "BatchAttention".
        backend: what the call's `backend` would be; calls without that argument have "auto" alone.
        cc: the compute capability it must also run on; None for none.

    Raises:
        ValueError: there is no such public name.
    """
    if cc is not None and not is_compute_capability_supported(call, cc):
        return False
    function = _public(call)
    if "backend" not in inspect.signature(function).parameters:
        return backend == "auto"
    try:
        check_backend(call, backend)
    except UnsupportedError:
        return False
    return True


def add_queries(name: str, call: Callable[..., Any]) -> None:
    """Give a public function or class its two queries."""
    for query in (is_compute_capability_supported, is_backend_supported):
        bound = functools.partial(query, name)
        setattr(call, query.__name__, staticmethod(bound) if isinstance(call, type) else bound)


def _public(call: str) -> Callable[..., Any]:
    import fi_backend

    if call not in fi_backend.__all__:
        raise ValueError(f"call must be a public name of fi_backend, as 'rmsnorm'; got {call!r}")
    return getattr(fi_backend, call)
