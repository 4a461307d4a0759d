"""Every exception fi_backend raises on purpose.

::

    Exception
    └── FiBackendError
        ├── UnsupportedError (also ValueError)     the request is understood, we cannot serve it
        ├── EnvironmentVariableError (also ValueError)   a FI_BACKEND_* variable does not parse
        └── JitError                               a kernel module cannot be had
            ├── ToolchainError                     no usable compiler, or no ninja
            ├── BuildError                         a compiler or the linker failed
            ├── CacheLockTimeout (also TimeoutError)   another process builds it for too long
            ├── ModuleLoadError                    a finished module does not load here
            └── MissingModuleError                 the JIT is disabled and no prebuilt module fits

Bad arguments raise plain ``ValueError`` and ``TypeError``. Every message names what is wrong, its
value, what is allowed, and the next step.
"""

from __future__ import annotations

__all__ = [
    "BuildError",
    "CacheLockTimeout",
    "EnvironmentVariableError",
    "FiBackendError",
    "JitError",
    "MissingModuleError",
    "ModuleLoadError",
    "ToolchainError",
    "UnsupportedError",
]


class FiBackendError(Exception):
    """Base of all errors of this package."""


class UnsupportedError(FiBackendError, ValueError):
    """The arguments are well formed, but no kernel of ours serves this combination."""


class EnvironmentVariableError(FiBackendError, ValueError):
    """A ``FI_BACKEND_*`` environment variable has a value that does not parse."""


class JitError(FiBackendError):
    """A kernel module could not be compiled, found or loaded."""


class ToolchainError(JitError):
    """A compiler or ninja is missing, or cannot be run."""


class BuildError(JitError):
    """A compile or link command failed.

    Attributes:
        modules: names of the modules that were not built.
        command: the first failing command, as the shell saw it.
        log: everything the failing commands printed.
    """

    def __init__(self, message: str, *, modules: tuple[str, ...], command: str, log: str) -> None:
        super().__init__(message)
        self.modules = modules
        self.command = command
        self.log = log


class CacheLockTimeout(JitError, TimeoutError):
    """Another process holds the build lock of a module for longer than allowed."""


class ModuleLoadError(JitError):
    """The dynamic loader refused a module that was built for this machine."""


class MissingModuleError(JitError):
    """Compiling is disabled and neither the AOT directory nor the cache has the module."""
