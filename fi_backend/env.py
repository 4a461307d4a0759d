"""Every environment variable of fi_backend: name, type, default and meaning.

A variable is read when it is needed, never at import: ``env.CACHE_DIR.get()``. Parsing is strict: a
value that is not allowed raises :class:`~fi_backend.errors.EnvironmentVariableError`, which names
the variable, its value and what is allowed. An empty value counts as unset.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from fi_backend.errors import EnvironmentVariableError

__all__ = ["PREFIX", "VARIABLES", "Variable", "unknown_names"]

T = TypeVar("T")
PREFIX = "FI_BACKEND_"


@dataclass(frozen=True)
class Variable(Generic[T]):
    """One environment variable.

    Attributes:
        name: full name, with our prefix.
        kind: its type as a person reads it.
        default: value of :meth:`get` when it is unset.
        meaning: one sentence.
        parse: text to value; raises ``ValueError`` with what is allowed.
        aliases: other names that are read, in order, when ``name`` is unset.
    """

    name: str
    kind: str
    default: T
    meaning: str
    parse: Callable[[str], T]
    aliases: tuple[str, ...] = ()

    def source(self, environ: Mapping[str, str] | None = None) -> str | None:
        """Return the name of the variable that supplies the value; None if it is the default."""
        environ = os.environ if environ is None else environ
        return next((n for n in (self.name, *self.aliases) if environ.get(n, "").strip()), None)

    def get(self, environ: Mapping[str, str] | None = None) -> T:
        """Return the parsed value, or the default.

        Raises:
            EnvironmentVariableError: the value is not allowed.
        """
        environ = os.environ if environ is None else environ
        source = self.source(environ)
        if source is None:
            return self.default
        text = environ[source].strip()
        try:
            return self.parse(text)
        except ValueError as error:
            raise EnvironmentVariableError(
                f"{source}={text!r} is not allowed: expected {error}; "
                f"correct the variable or unset it (default: {self.default!r})"
            ) from None


_BOOLEANS = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off"), False),
}


def _bool(text: str) -> bool:
    try:
        return _BOOLEANS[text.lower()]
    except KeyError:
        raise ValueError("a boolean: 1/true/yes/on or 0/false/no/off") from None


def _int_at_least(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < minimum:
            raise ValueError(f"an integer of at least {minimum}")
        return int(text)

    return parse


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError("a number of seconds, 0 or more")
    return value


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in allowed:
            raise ValueError("one of " + ", ".join(allowed))
        return text.lower()

    return parse


def _level(text: str) -> int:
    if text not in ("0", "1", "3", "5", "10"):
        raise ValueError("one of 0 (off), 1 (names), 3 (shapes and dtypes), 5 (statistics)")
    return min(int(text), 5)  # FlashInfer's 10 also dumps tensors, which nothing here does


def _absolute_path(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_absolute():
        raise ValueError("an absolute path (~ is allowed)")
    return path


def _flags(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"shell-quoted words ({error})") from None


def _text(text: str) -> str:
    return text


def _boolean(name: str, meaning: str) -> Variable[bool]:
    return Variable(PREFIX + name, "bool", False, meaning, _bool)


def _optional_boolean(name: str, meaning: str) -> Variable[bool | None]:
    return Variable(PREFIX + name, "bool", None, meaning, _bool)


def _words(name: str, meaning: str) -> Variable[tuple[str, ...]]:
    return Variable(PREFIX + name, "words", (), meaning, _flags)


def _path(name: str, meaning: str, *aliases: str) -> Variable[Path | None]:
    return Variable(PREFIX + name, "path", None, meaning, _absolute_path, aliases)


# Where things are.
CACHE_DIR = _path(
    "CACHE_DIR", "Directory of compiled kernels; default $XDG_CACHE_HOME/fi_backend or under ~."
)
WORKSPACE_BASE = _path("WORKSPACE_BASE", "Stands in for ~: kernels go to <base>/.cache/fi_backend.")
AOT_DIR = _path("AOT_DIR", "Directory written by `fi-backend aot`, searched before the cache.")

# How kernels are compiled.
CUDA_ARCH_LIST = Variable[str | None](
    PREFIX + "CUDA_ARCH_LIST",
    "text",
    None,
    "CUDA architectures to compile for, as '8.0 9.0a 12.0f 8.0+PTX'; default: the GPUs present.",
    _text,
)
CPU_ISA = Variable[str | None](
    PREFIX + "CPU_ISA",
    "choice",
    None,
    "Instruction set of CPU kernels; default: the best that this CPU has.",
    _choice("avx512_bf16", "avx512", "avx2", "generic"),
)
CXX = Variable[tuple[str, ...]](
    PREFIX + "CXX", "words", (), "C++ compiler command; default g++, then c++.", _flags, ("CXX",)
)
NVCC = _path("NVCC", "nvcc to use; default: CUDA_HOME, CUDA_PATH, PATH, then Python wheels.")
NVCC_THREADS = Variable(
    PREFIX + "NVCC_THREADS", "int", 1, "Threads of one nvcc (--threads).", _int_at_least(1)
)
MAX_JOBS = Variable[int | None](
    PREFIX + "MAX_JOBS",
    "int",
    None,
    "Compiles at a time; default: the cores this machine or its control group allows.",
    _int_at_least(1),
    ("MAX_JOBS",),
)
EXTRA_CFLAGS = _words("EXTRA_CFLAGS", "Words added to every C++ compile command.")
EXTRA_CUDAFLAGS = _words("EXTRA_CUDAFLAGS", "Words added to every nvcc command.")
EXTRA_LDFLAGS = _words("EXTRA_LDFLAGS", "Words added to every link command.")
JIT_DEBUG = _boolean("JIT_DEBUG", "Compile without optimisation and with debug symbols.")
JIT_LINEINFO = _boolean("JIT_LINEINFO", "Keep source lines for profilers; code stays optimised.")
JIT_VERBOSE = _boolean("JIT_VERBOSE", "Print every compile command and all compiler output.")
DISABLE_JIT = _boolean("DISABLE_JIT", "Never compile: load from AOT_DIR or the cache, or fail.")
LOCK_TIMEOUT = Variable(
    PREFIX + "LOCK_TIMEOUT",
    "seconds",
    900.0,
    "How long to wait for another process that builds the same kernel.",
    _seconds,
)

# How calls behave.
CHECKED = _boolean(
    "CHECKED", "Validate page ids on the host before each run on a GPU; not in CUDA graphs."
)
SEPARATE_LAUNCHES = _boolean(
    "SEPARATE_LAUNCHES",
    "Run requests with few and with many query rows in launches of their own, also on sm_90.",
)
SHARED_PREFIX = _optional_boolean(
    "SHARED_PREFIX",
    "Let requests on a GPU attend once to long prefixes that they share: 1 everywhere, 0 nowhere; "
    "unset, in engines that cache prefixes.",
)
DISABLE = _boolean("DISABLE", "Do not register with any engine.")
STRICT = _boolean(
    "STRICT", "End an engine's process, or refuse its model, rather than stand aside."
)
KEEP_FLASHINFER = _boolean("KEEP_FLASHINFER", "SGLang: leave the name flashinfer as it is.")
AUTO = _boolean("AUTO", "Serve an engine even when it did not ask for us by name.")
LOGLEVEL = Variable(
    PREFIX + "LOGLEVEL",
    "level",
    0,
    "API call log: 0 off, 1 names, 3 shapes, 5 statistics; read at import.",
    _level,
    ("FLASHINFER_LOGLEVEL",),
)
LOGDEST = Variable(
    PREFIX + "LOGDEST",
    "text",
    "stderr",
    "Where the API call log goes: stdout, stderr or a file path (%i becomes the process id).",
    _text,
    ("FLASHINFER_LOGDEST",),
)
TRACE_DIR = _path(
    "TRACE_DIR", "Where each public call writes a JSON definition of itself once; read at import."
)
LOGGING_LEVEL = Variable(
    PREFIX + "LOGGING_LEVEL",
    "choice",
    "info",
    "Level of build messages where the process configured no logging.",
    _choice("debug", "info", "warning", "error", "critical"),
)

VARIABLES: tuple[Variable, ...] = tuple(v for v in globals().values() if isinstance(v, Variable))


def unknown_names(environ: Mapping[str, str] | None = None) -> list[str]:
    """Return the ``FI_BACKEND_*`` names that are set but mean nothing: likely misspelt."""
    environ = os.environ if environ is None else environ
    known = {variable.name for variable in VARIABLES}
    return sorted(n for n in environ if n.startswith(PREFIX) and n not in known)
