"""KernelSpec -> loaded module, once per process."""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING

from fi_backend.errors import ModuleLoadError
from fi_backend.jit import builder, entry, store
from fi_backend.jit.kernel_spec import KernelSpec
from fi_backend.jit.request import resolve

if TYPE_CHECKING:
    from pathlib import Path

    import tvm_ffi

_log = logging.getLogger("fi_backend.jit")

_modules: dict[str, tvm_ffi.Module] = {}
_locks: dict[str, threading.Lock] = {}


def _after_fork() -> None:
    _locks.clear()  # a thread that was loading when the process forked is not in the child


os.register_at_fork(after_in_child=_after_fork)


def load(spec: KernelSpec) -> tvm_ffi.Module:
    """Return the loaded module of ``spec``: from this process, prebuilt, cached, or built now.

    Thread safe. A module that is on disk loads without a compiler, ninja or any subprocess. The
    environment is read when a module is first loaded; later calls return the same module.

    Raises:
        UnsupportedError: the spec does not support the architecture asked for.
        BuildError, ToolchainError, MissingModuleError, CacheLockTimeout: it cannot be built.
        ModuleLoadError: it was built, but the dynamic loader refuses it.
    """
    key = spec.identity
    module = _modules.get(key)
    if module is None:
        with _locks.setdefault(key, threading.Lock()):
            module = _modules.get(key)
            if module is None:
                module = _modules[key] = _load(spec)
    return module


def _load(spec: KernelSpec) -> tvm_ffi.Module:
    request = resolve(spec)
    rejected: list[Path] = []
    directory = store.find(request)
    if directory is not None:
        try:
            return _open(directory)
        except ModuleLoadError as error:
            # Built for another machine in a way no check of ours sees, such as a newer libstdc++.
            _log.warning("%s; building it again", error)
            rejected.append(directory)
    directory = builder.ensure([request], rejected=rejected)[request.family]
    return _open(directory)


def _open(directory: Path) -> tvm_ffi.Module:
    import tvm_ffi

    library = str(directory / entry.LIBRARY)
    try:
        return tvm_ffi.load_module(library)
    except (OSError, RuntimeError) as error:
        raise ModuleLoadError(
            f"{library} does not load: {error}; if it persists, run `fi-backend clear-cache`"
        ) from error
