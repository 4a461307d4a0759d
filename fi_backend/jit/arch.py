"""CUDA architectures: parse a list, map to the names nvcc wants, find the GPUs present.

As FlashInfer does, a plain ``9.0`` becomes ``9.0a`` (wgmma and TMA need it), 10.x and 11.x get the
``a`` suffix and 12.x and up the family suffix ``f`` (nvcc 12.9 and newer). A suffix that is written
out is kept; ``+PTX`` adds forward-compatible code, ``compute_80`` asks for that alone.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from functools import lru_cache

from fi_backend import env
from fi_backend.errors import EnvironmentVariableError, ToolchainError, UnsupportedError

_TOKEN = re.compile(r"(?:(\d+)\.(\d)|(sm|compute)_(\d+)(\d))([af]?)(\+PTX)?", re.IGNORECASE)
_MIN_MAJOR = 7


@dataclass(frozen=True, order=True)
class Arch:
    """One ``-gencode`` target.

    Attributes:
        major, minor: compute capability.
        suffix: ``""``, ``"a"`` (this architecture only) or ``"f"`` (its family).
        sass: emit machine code.
        ptx: emit PTX, which the driver compiles for newer GPUs.
    """

    major: int
    minor: int
    suffix: str = ""
    sass: bool = True
    ptx: bool = False

    @property
    def digits(self) -> str:
        return f"{self.major}{self.minor}{self.suffix}"

    def __str__(self) -> str:
        if not self.sass:
            return f"compute_{self.digits}"
        return f"{self.major}.{self.minor}{self.suffix}" + ("+PTX" if self.ptx else "")

    def gencode(self) -> tuple[str, ...]:
        """Return the nvcc flags."""
        virtual = f"arch=compute_{self.digits}"
        codes = [f"sm_{self.digits}"] * self.sass + [f"compute_{self.digits}"] * self.ptx
        return tuple(f"-gencode={virtual},code={code}" for code in codes)

    def runs_on(self, major: int, minor: int) -> bool:
        """Return whether code of this target executes on a GPU of that compute capability."""
        device = (major, minor)
        own = (self.major, self.minor)
        if self.suffix == "a":
            return device == own
        if self.suffix == "f" or not self.ptx:
            return major == self.major and device >= own
        return device >= own


def _with_suffix(major: int) -> str:
    if major < 9:
        return ""
    return "a" if major < 12 else "f"


def parse_token(token: str) -> Arch:
    """Return the target that one word of an architecture list means.

    Raises:
        ValueError: the word is not an architecture.
    """
    match = _TOKEN.fullmatch(token)
    if match is None:
        raise ValueError(f"{token!r} is not an architecture")
    major, minor = int(match[1] or match[4]), int(match[2] or match[5])
    if major < _MIN_MAJOR:
        raise ValueError(f"{token!r}: compute capability must be at least {_MIN_MAJOR}.0")
    named = (match[3] or "").lower()  # sm_90 and compute_80 are nvcc's own words: taken as they are
    suffix = match[6].lower() or ("" if named or match[7] else _with_suffix(major))
    only_ptx = named == "compute"
    return Arch(major, minor, suffix, sass=not only_ptx, ptx=only_ptx or bool(match[7]))


def parse_list(text: str) -> tuple[Arch, ...]:
    """Return the sorted, distinct targets of a list separated by spaces, commas or semicolons.

    Raises:
        ValueError: the list is empty or a word is not an architecture.
    """
    tokens = [token for token in re.split(r"[\s,;]+", text) if token]
    if not tokens:
        raise ValueError("the architecture list is empty")
    return tuple(sorted({parse_token(token) for token in tokens}))


@lru_cache(maxsize=1)
def detect() -> tuple[tuple[int, int], ...]:
    """Return the compute capabilities of the GPUs present, sorted and distinct.

    Asks NVML, which needs no CUDA context, so that a later fork stays safe; once per process, for
    it takes 17 ms. Empty without a GPU.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return ()
    if nvml.nvmlInit_v2() != 0:
        return ()
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return ()
        return tuple(sorted(filter(None, {_capability(nvml, i) for i in range(count.value)})))
    finally:
        nvml.nvmlShutdown()


def _capability(nvml: ctypes.CDLL, index: int) -> tuple[int, int] | None:
    device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != 0:
        return None
    query = nvml.nvmlDeviceGetCudaComputeCapability
    if query(device, ctypes.byref(major), ctypes.byref(minor)) != 0:
        return None
    return major.value, minor.value


def resolve() -> tuple[Arch, ...]:
    """Return the targets to compile for: ``FI_BACKEND_CUDA_ARCH_LIST``, or the GPUs present.

    Raises:
        EnvironmentVariableError: the variable does not parse.
        ToolchainError: it is unset and there is no GPU.
    """
    text = env.CUDA_ARCH_LIST.get()
    if text is not None:
        try:
            return parse_list(text)
        except ValueError as error:
            raise EnvironmentVariableError(
                f"{env.CUDA_ARCH_LIST.name}={text!r} is not allowed: {error}; "
                "write for example '9.0a', '8.0 9.0a', '8.0+PTX' or 'compute_80'"
            ) from None
    found = detect()
    if not found:
        raise ToolchainError(
            "cannot tell which CUDA architecture to compile for: no GPU answers through NVML; "
            f"set {env.CUDA_ARCH_LIST.name}, for example to 9.0a"
        )
    return tuple(Arch(major, minor, _with_suffix(major)) for major, minor in found)


def select(
    archs: tuple[Arch, ...], supported_majors: tuple[int, ...] | None, *, module: str
) -> tuple[Arch, ...]:
    """Return those of ``archs`` that a module can be compiled for.

    Raises:
        UnsupportedError: none of them is.
    """
    if supported_majors is None:
        return archs
    usable = tuple(arch for arch in archs if arch.major in supported_majors)
    if not usable:
        raise UnsupportedError(
            f"{module}: no kernel for CUDA architecture {', '.join(map(str, archs))}; this module "
            f"supports compute capability {', '.join(f'{m}.x' for m in supported_majors)}; "
            f"add one of them to {env.CUDA_ARCH_LIST.name} or choose another kernel"
        )
    return usable
