"""CPU instruction sets: which this machine has, and which flags compile for one.

Never ``-march=native``: a cache on a shared home must say what its code needs.
"""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

from fi_backend import env
from fi_backend.errors import UnsupportedError

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_AVX2_FEATURES = frozenset({"avx2", "fma", "f16c"})
_AVX512_FEATURES = _AVX2_FEATURES | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}

# Best first. The words are those of /proc/cpuinfo, which lists a feature only where the kernel
# also saves its registers.
_LEVELS: dict[str, tuple[frozenset[str], tuple[str, ...]]] = {
    "avx512_bf16": (_AVX512_FEATURES | {"avx512_bf16"}, (*_AVX512, "-mavx512bf16")),
    "avx512": (_AVX512_FEATURES, _AVX512),
    "avx2": (_AVX2_FEATURES, _AVX2),
    "generic": (frozenset(), ()),
}
LEVELS = tuple(_LEVELS)


def flags(isa: str) -> tuple[str, ...]:
    """Return the compiler flags of a level."""
    return _LEVELS[isa][1]


def parse_cpuinfo(text: str) -> frozenset[str]:
    """Return the feature words of a ``/proc/cpuinfo`` text (``flags`` or ``Features``)."""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def best_level(features: frozenset[str]) -> str:
    """Return the best level whose features are all present."""
    return next(level for level, (needs, _) in _LEVELS.items() if needs <= features)


@lru_cache(maxsize=1)
def host_level() -> str:
    """Return the best level of this machine; ``generic`` where it cannot be told."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "generic"
    try:
        return best_level(parse_cpuinfo(Path("/proc/cpuinfo").read_text(encoding="utf-8")))
    except OSError:
        return "generic"


def runs_here(isa: str) -> bool:
    """Return whether this machine executes code compiled for ``isa``."""
    return isa in LEVELS and LEVELS.index(isa) >= LEVELS.index(host_level())


def resolve() -> str:
    """Return the level to compile for: ``FI_BACKEND_CPU_ISA``, or the best of this machine.

    Raises:
        UnsupportedError: the variable asks for more than this CPU has.
    """
    asked = env.CPU_ISA.get()
    if asked is None:
        return host_level()
    if not runs_here(asked):
        allowed = ", ".join(LEVELS[LEVELS.index(host_level()) :])
        raise UnsupportedError(
            f"{env.CPU_ISA.name}={asked} needs instructions that this CPU does not have; "
            f"it runs {allowed}; choose one of these or unset the variable"
        )
    return asked
