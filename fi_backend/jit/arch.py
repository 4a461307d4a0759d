"""CUDA architectures: parse a list, map to the names nvcc wants, find the GPUs present.

As FlashInfer does, a plain ``9.0`` becomes ``9.0a`` (wgmma and TMA need it), 10.x and 11.x get the
``a`` suffix and 12.x and up the family suffix ``f`` (nvcc 12.9 and newer). A suffix that is written
out is kept; ``+PTX`` adds forward-compatible code, ``compute_80`` asks for that alone.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from fi_backend import env
from fi_backend.errors import EnvironmentVariableError, ToolchainError, UnsupportedError

_TOKEN = re.compile(r"(?:(\d+)\.(\d)|(sm|compute)_(\d+)(\d))([af]?)(\+PTX)?", re.IGNORECASE)
_MIN_MAJOR = 8  # cp.async and bf16


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
    """Return the compute capabilities of the GPUs that CUDA shows us, sorted and distinct.

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
        devices = [_describe(nvml, index) for index in range(count.value)]
    finally:
        nvml.nvmlShutdown()
    seen = {devices[index][1] for index in _visible([uuid for uuid, _ in devices])}
    return tuple(sorted(filter(None, seen)))


def _describe(nvml: ctypes.CDLL, index: int) -> tuple[str, tuple[int, int] | None]:
    """Return the UUID and the compute capability of a GPU, in NVML's order."""
    device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    uuid = ctypes.create_string_buffer(96)
    if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != 0:
        return "", None
    nvml.nvmlDeviceGetUUID(device, uuid, len(uuid))
    query = nvml.nvmlDeviceGetCudaComputeCapability
    if query(device, ctypes.byref(major), ctypes.byref(minor)) != 0:
        return "", None
    return uuid.value.decode(), (major.value, minor.value)


def _visible(uuids: Sequence[str]) -> list[int]:
    """Return the places of the GPUs that CUDA_VISIBLE_DEVICES shows, or of all if that is unclear.

    Numbers count GPUs in NVML's order only if CUDA_DEVICE_ORDER says so, and who owns a MIG slice
    is not asked.
    """
    everything = list(range(len(uuids)))
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return everything
    in_bus_order = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    found: list[int] = []
    for word in map(str.strip, text.split(",")):
        if word.startswith("MIG-") or (word.isdecimal() and not in_bus_order):
            return everything
        if word.isdecimal():
            places = [int(word)] if int(word) < len(uuids) else []
        else:
            places = [i for i, uuid in enumerate(uuids) if word and uuid.startswith(word)]
        if not places:  # CUDA looks at nothing behind a name of no GPU
            break
        found += places
    return found


def resolve() -> tuple[Arch, ...]:
    """Return the targets to compile for: ``FI_BACKEND_CUDA_ARCH_LIST``, or the GPUs present.

    Raises:
        EnvironmentVariableError: the variable does not parse.
        ToolchainError: it is unset and there is no GPU that kernels can be compiled for.
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
    # An old card that drives a display does not matter: nothing is compiled for it.
    found = [Arch(major, minor, _with_suffix(major)) for major, minor in detect()]
    usable = tuple(arch for arch in found if arch.major >= _MIN_MAJOR)
    if not usable:
        seen = f"the GPUs here are of {', '.join(map(str, found))}" if found else "no GPU answers"
        raise ToolchainError(
            "cannot tell which CUDA architecture to compile for: need a GPU of compute capability "
            f"{_MIN_MAJOR}.0 or later, and {seen} through NVML under CUDA_VISIBLE_DEVICES; "
            f"set {env.CUDA_ARCH_LIST.name}, for example to 9.0a"
        )
    return usable


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
