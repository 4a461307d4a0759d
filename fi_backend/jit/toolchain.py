"""Find g++, nvcc and ninja, and tell one compiler from another.

Two levels of identity. :func:`drivers` needs only ``stat``: a warm load uses it, and it names the
cache entry. :func:`describe` runs the compilers and is called where something is compiled anyway:
it adds the version text and the programs behind the driver, whose stamps the entry records, so that
a compiler replaced behind an unchanged wrapper script is noticed too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from fi_backend import env
from fi_backend.errors import ToolchainError

# Where NVIDIA's Python wheels put the compiler, under site-packages.
_NVCC_IN_WHEELS = ("nvidia/cu13/bin/nvcc", "nvidia/cuda_nvcc/bin/nvcc")
_CUDA_IN_WHEELS = ("nvidia/cu13", "nvidia/cuda_runtime", "nvidia/cuda_cccl")


def stamp(path: str | os.PathLike[str]) -> str:
    """Return text that changes when the file behind ``path`` is replaced.

    Raises:
        OSError: there is no such file.
    """
    real = os.path.realpath(path)
    status = os.stat(real)
    return f"{real}|{status.st_size}|{int(status.st_mtime)}"


def find_cxx() -> tuple[str, ...] | None:
    """Return the C++ compiler as command words, each program resolved; None without one.

    Words are a launcher if there is one, the compiler, and flags that go with it wherever it runs.
    """
    for words in [asked] if (asked := env.CXX.get()) else [("g++",), ("c++",)]:
        program = shutil.which(words[0])
        if program is not None:
            # The second program of a launcher ("ccache g++") is resolved as well.
            return (program, *(shutil.which(w) or w for w in words[1:]))
    return None


def _in_wheels(paths: tuple[str, ...]) -> list[str]:
    """Return where installed Python wheels may have `paths`, in import order."""
    return [os.path.join(site, path) for site in sys.path if site for path in paths]


def find_nvcc() -> str | None:
    """Return nvcc; None without one. An explicit ``FI_BACKEND_NVCC`` that is missing is None."""
    asked = env.NVCC.get()
    if asked is not None:
        return shutil.which(str(asked))
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [os.path.join(home, "bin", "nvcc") for home in homes if home] + ["nvcc"]
    candidates += _in_wheels(_NVCC_IN_WHEELS)
    return next(filter(None, map(shutil.which, candidates)), None)


def find_ninja() -> str | None:
    """Return ninja: the one of the Python package next to this interpreter, or from PATH."""
    scripts = os.path.join(sysconfig.get_path("scripts"), "ninja")
    return shutil.which(scripts) or shutil.which("ninja")


def drivers(target: str) -> tuple[str, ...] | None:
    """Return the stamps of the compilers of ``target`` ("cpu" or "cuda"); None if one is missing.

    Flags among the words of the C++ compiler are part of what it is. Runs nothing.
    """
    cxx = find_cxx()
    nvcc = find_nvcc() if target == "cuda" else None
    if cxx is None or (target == "cuda" and nvcc is None):
        return None
    words = cxx if nvcc is None else (*cxx, nvcc)
    return tuple(stamp(word) if os.path.isabs(word) else word for word in words)


@dataclass(frozen=True)
class Toolchain:
    """The programs of one build, and who they are.

    Attributes:
        cxx: C++ compiler command words; see find_cxx().
        ninja: path of ninja.
        nvcc: path of nvcc; None for the CPU target.
        cuda_include, cuda_lib: directories of the CUDA runtime, for g++ and the linker.
        versions: first line of each compiler's version text.
        files: stamps of the drivers and of the programs behind them.
    """

    cxx: tuple[str, ...]
    ninja: str
    nvcc: str | None
    cuda_include: tuple[str, ...]
    cuda_lib: tuple[str, ...]
    versions: tuple[str, ...]
    files: tuple[str, ...]

    def host_compiler(self) -> tuple[str, tuple[str, ...]]:
        """Return the C++ compiler without a launcher, and its flags: nvcc takes them apart."""
        flags = next((i for i, word in enumerate(self.cxx) if word.startswith("-")), len(self.cxx))
        return self.cxx[flags - 1], self.cxx[flags:]


def describe(target: str) -> Toolchain:
    """Find and run the compilers of ``target``.

    Raises:
        ToolchainError: one is missing or does not run; says what to install or set.
    """
    cxx = find_cxx()
    if cxx is None:
        asked = " ".join(env.CXX.get()) or "g++ or c++"
        raise ToolchainError(
            f"no C++ compiler: {asked} is not on PATH; install one (Debian: apt-get install g++), "
            f"set {env.CXX.name}, or load prebuilt kernels through {env.AOT_DIR.name}"
        )
    ninja = find_ninja()
    if ninja is None:
        raise ToolchainError("no ninja; run: pip install ninja")
    version = _output(*cxx, "--version")
    behind = [_output(*cxx, "-print-prog-name=cc1plus")]
    if target == "cpu":
        return Toolchain(cxx, ninja, None, (), (), (_first_line(version),), _stamps(cxx, behind))
    nvcc = find_nvcc()
    if nvcc is None:
        raise ToolchainError(
            f"no nvcc: looked at {env.NVCC.name}, CUDA_HOME, CUDA_PATH, PATH and Python wheels; "
            "run: pip install 'fi-backend[nvcc]', or install the CUDA toolkit and set CUDA_HOME"
        )
    home = _cuda_home(nvcc)
    behind += [f"{home}/{name}" for name in ("bin/nvcc", "nvvm/bin/cicc", "bin/ptxas")]
    release = re.search(r"^.*release.*$", _output(nvcc, "--version"), re.MULTILINE)
    versions = (_first_line(version), release[0] if release else "nvcc")
    include, lib = _cuda_dirs(home)
    return Toolchain(cxx, ninja, nvcc, include, lib, versions, _stamps((*cxx, nvcc), behind))


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _stamps(words: tuple[str, ...], behind: list[str]) -> tuple[str, ...]:
    programs = [word for word in words if os.path.isabs(word)]
    programs += [path for path in behind if os.path.isabs(path) and os.path.isfile(path)]
    return tuple(dict.fromkeys(map(stamp, programs)))


def _output(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=60, env=child_environ()
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ToolchainError(
            f"the compiler does not run: {' '.join(command)}: {error}; "
            f"repair it, or set {env.CXX.name} / {env.NVCC.name} to another one"
        ) from error
    return done.stdout.strip()


def child_environ() -> dict[str, str]:
    """Return this process's environment without what an engine sets for its own threads."""
    dropped = ("LD_PRELOAD", "OMP_", "KMP_", "GOMP_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    return {**kept, "LC_ALL": "C"}


def _cuda_home(nvcc: str) -> str:
    """Return the toolkit that nvcc belongs to, even where nvcc is a wrapper script."""
    real = Path(os.path.realpath(nvcc)).parent.parent
    if (real / "nvvm").is_dir():
        return str(real)
    done = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=child_environ(),
    )
    here = re.search(r"^#\$ _HERE_=(.+)$", done.stderr, re.MULTILINE)
    return str(Path(here[1]).parent) if here else str(real)


def _cuda_dirs(home: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the existing include and library directories of the CUDA runtime."""
    roots = [home, *_in_wheels(_CUDA_IN_WHEELS)]
    include = [f"{root}/include" for root in roots]
    include += [f"{path}/cccl" for path in include]  # CUDA 13 keeps libcu++ and CUB there
    lib = [f"{root}/{name}" for root in roots for name in ("lib64", "lib")]
    existing = [tuple(d for d in dirs if os.path.isdir(d)) for dirs in (include, lib)]
    return existing[0], existing[1]
