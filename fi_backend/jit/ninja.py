"""Modules -> the text of one build.ninja. Pure: reads and writes nothing."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fi_backend.jit.entry import LIBRARY
from fi_backend.jit.flags import Flags
from fi_backend.jit.toolchain import Toolchain

# ninja prints a command's description when it ends; the builder recognises finished modules by it.
LINKED = "LINK "
_PARTIAL = f"{LIBRARY}.part"

_HEADER = """\
ninja_required_version = 1.5

rule cxx
  command = $cmd
  description = CXX $label
rule nvcc
  command = $cmd
  description = NVCC $label
rule link
  command = $cmd
  description = {linked}$label
"""


@dataclass(frozen=True)
class Module:
    """One shared library of the graph.

    Attributes:
        name: unique in the graph; its label in progress and errors.
        directory: absolute; holds the sources, receives objects and ``module.so``.
        published: where the directory will be moved to; debug information names it.
        units: source file names, ``.cc`` or ``.cu``.
        flags: complete flags.
        include_dirs: headers of ours.
        tvm_ffi: directory with tvm-ffi's ``include`` and ``lib``.
        toolchain: the compilers.
        nvcc_threads: ``--threads`` of nvcc.
    """

    name: str
    directory: Path
    published: Path
    units: tuple[str, ...]
    flags: Flags
    include_dirs: tuple[Path, ...]
    tvm_ffi: Path
    toolchain: Toolchain
    nvcc_threads: int = 1


def object_name(unit: str) -> str:
    """Return the object file of a source file."""
    return f"{unit}.o"


def compile_command(module: Module, unit: str) -> list[str]:
    """Return the words of the command that compiles one unit."""
    chain = module.toolchain
    ours = [f"-I{path}" for path in module.include_dirs]
    # Two words: nvcc does not take the joined form.
    cuda = [word for path in chain.cuda_include for word in ("-isystem", path)]
    files = ["-c", str(module.directory / unit), "-o", str(module.directory / object_name(unit))]
    if unit.endswith(".cu"):
        assert chain.nvcc is not None
        # A .cu is device code and its launcher: it never sees tvm-ffi, which costs seconds there.
        compiler, own_flags = chain.host_compiler()
        host = ["-ccbin", compiler, *(f"-Xcompiler={flag}" for flag in own_flags)]
        threads = f"--threads={module.nvcc_threads}"
        return [chain.nvcc, *host, threads, *module.flags.cuda, *ours, *cuda, *files]
    moved = f"-ffile-prefix-map={module.directory}={module.published}"
    ffi = [f"-isystem{module.tvm_ffi / 'include'}"]
    return [*chain.cxx, *module.flags.cxx, moved, *ours, *ffi, *cuda, *files]


def link_command(module: Module) -> list[str]:
    """Return the words of the command that links the module."""
    objects = [str(module.directory / object_name(unit)) for unit in module.units]
    # Undefined symbols fail here, with a log, rather than when an engine loads the module.
    words = [*module.toolchain.cxx, "-shared", "-Wl,-z,defs", *objects]
    words += [f"-L{module.tvm_ffi / 'lib'}", "-ltvm_ffi", *_cudart(module.toolchain)]
    return [*words, *module.flags.link, "-o", str(module.directory / _PARTIAL)]


def _cudart(chain: Toolchain) -> list[str]:
    if chain.nvcc is None:
        return []
    # Static: the module then runs beside whichever CUDA runtime the process has loaded.
    return [
        *(f"-L{path}" for path in chain.cuda_lib),
        "-lcudart_static",
        "-ldl",
        "-lrt",
        "-lpthread",
    ]


def graph(modules: Sequence[Module]) -> str:
    """Return one build.ninja text that builds every module, as parallel as they allow."""
    lines = [_HEADER.format(linked=LINKED)]
    targets = []
    for module in modules:
        objects = []
        for unit in module.units:
            target = _path(module.directory / object_name(unit))
            rule = "nvcc" if unit.endswith(".cu") else "cxx"
            lines += _edge(
                f"{target}: {rule} {_path(module.directory / unit)}",
                compile_command(module, unit),
                f"{module.name}/{unit}",
            )
            objects.append(target)
        library = _path(module.directory / LIBRARY)
        lines += _edge(
            f"{library}: link {' '.join(objects)}",
            link_command(module),
            module.name,
            # A library under its final name is a finished one.
            then=["mv", "-f", str(module.directory / _PARTIAL), str(module.directory / LIBRARY)],
        )
        targets.append(library)
    lines += [f"default {' '.join(targets)}", ""]
    return "\n".join(lines)


def _edge(rule: str, command: list[str], label: str, then: Sequence[str] = ()) -> list[str]:
    text = " && ".join(_shell(words) for words in (command, then) if words)
    return [f"build {rule}", f"  cmd = {text}", f"  label = {label}"]


def _shell(words: Sequence[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _path(path: Path) -> str:
    text = str(path)
    for char in "$ :":
        text = text.replace(char, f"${char}")
    return text
