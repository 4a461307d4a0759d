"""The flags of a module, without paths: they are part of its cache key, and a cache may move."""

from __future__ import annotations

from dataclasses import dataclass

from fi_backend import env
from fi_backend.jit import arch, isa
from fi_backend.jit.kernel_spec import KernelSpec

# Infinities and NaN keep their meaning. What is switched off is errno, floating-point traps and
# the ban on fusing a multiply with an add.
_MATH = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
# Hidden symbols: two modules in one process must not share an inline variable of a header by
# accident, whichever version of that header each was compiled with.
_SHARED = ("-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden")
# Running off the end of a function is undefined behaviour, and in practice a crash far away.
_ERRORS = ("-Werror=return-type",)
_OPTIMISED = ("-O3", "-DNDEBUG")
# The C++ of a CUDA module checks arguments and launches: with -O3 it takes g++ longer to compile
# than nvcc needs for the kernels (5.2 s against 2.8 for attention).
_LAUNCHES = ("-O1", "-DNDEBUG")
_DEBUG = ("-Og", "-g3", "-fno-omit-frame-pointer")


@dataclass(frozen=True)
class Flags:
    """Flags of one module: for each C++ file, each CUDA file, and the link."""

    cxx: tuple[str, ...]
    cuda: tuple[str, ...]
    link: tuple[str, ...]


def common(spec: KernelSpec) -> Flags:
    """Return all flags but those that choose an instruction set or GPU architecture."""
    debug, lineinfo = env.JIT_DEBUG.get(), env.JIT_LINEINFO.get()
    level = _DEBUG if debug else _LAUNCHES if spec.target == "cuda" else _OPTIMISED
    lines = ("-g1",) if lineinfo and not debug else ()
    cxx = ("-std=c++17", *level, *lines, *_SHARED, *_ERRORS, *_MATH)
    cuda: tuple[str, ...] = ()
    if spec.target == "cuda":
        level = ("-O0", "-g", "-G") if debug else _OPTIMISED
        lines = ("-lineinfo",) if lineinfo and not debug else ()
        host = tuple(f"-Xcompiler={flag}" for flag in _SHARED)
        cuda = ("-std=c++17", *level, *lines, "-Xfatbin=-compress-all", *host)
        cuda += (*spec.extra_cuda_cflags, *env.EXTRA_CUDAFLAGS.get())
    return Flags(
        cxx=(*cxx, *spec.extra_cflags, *env.EXTRA_CFLAGS.get()),
        cuda=cuda,
        link=(*spec.extra_ldflags, *env.EXTRA_LDFLAGS.get()),
    )


def for_machine(flags: Flags, level: str | None, archs: tuple[arch.Arch, ...]) -> Flags:
    """Return ``flags`` with those of an instruction set and of GPU architectures."""
    gencode = tuple(word for item in archs for word in item.gencode())
    isa_flags = isa.flags(level) if level is not None else ()
    # First, so that a spec's own -m flags have the last word.
    return Flags((*isa_flags, *flags.cxx), (*gencode, *flags.cuda), flags.link)
