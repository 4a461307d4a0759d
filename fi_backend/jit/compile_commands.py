"""compile_commands.json, so that clangd understands the rendered templates and our headers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from fi_backend.jit import arch, ninja, paths, render, store, toolchain
from fi_backend.jit.kernel_spec import KernelSpec
from fi_backend.jit.request import Request, resolve

# nvcc spellings that clang does not know; --cuda-gpu-arch says the rest.
_NVCC_ONLY = ("-gencode", "-Xcompiler", "-Xfatbin", "--threads", "-ccbin", "--expt", "-lineinfo")


def write(specs: Iterable[KernelSpec], output: Path) -> int:
    """Render every spec and write the commands that would compile it.

    Returns:
        The number of translation units written.
    """
    commands = [command for spec in dict.fromkeys(specs) for command in _commands(resolve(spec))]
    output.write_text(json.dumps(commands, indent=1) + "\n", encoding="utf-8")
    return len(commands)


def _commands(request: Request) -> list[dict[str, object]]:
    directory = store.write_root() / "clangd" / request.family
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    units = render.render(request.spec)
    for unit, text in units.items():
        (directory / unit).write_text(text, encoding="utf-8")
    module = ninja.Module(
        name=request.family,
        directory=directory,
        published=directory,
        units=tuple(units),
        flags=request.flags,
        include_dirs=paths.include_dirs(paths.source_roots(request.spec)),
        tvm_ffi=paths.tvm_ffi_dir(),
        toolchain=toolchain.describe(request.spec.target),
    )
    return [
        {
            "directory": str(directory),
            "file": str(directory / unit),
            "arguments": _for_clang(ninja.compile_command(module, unit), request.archs, unit),
        }
        for unit in units
    ]


def _for_clang(words: list[str], archs: tuple[arch.Arch, ...], unit: str) -> list[str]:
    if not unit.endswith(".cu"):
        return words
    kept = [word for word in words[3:] if not word.startswith(_NVCC_ONLY) and word != "-G"]
    newest = max(archs, key=lambda a: (a.major, a.minor))
    return ["clang++", "-x", "cuda", f"--cuda-gpu-arch=sm_{newest.digits}", *kept]
