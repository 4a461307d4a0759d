"""Texts of the ``fi-backend`` command: what is configured, and what is compiled."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence

from fi_backend import __version__, env
from fi_backend.errors import FiBackendError
from fi_backend.jit import KernelSpec, arch, isa, paths, registry, store, toolchain
from fi_backend.jit.request import resolve


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return lines with left-aligned columns."""
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def config_lines() -> list[str]:
    """Return the report of ``show-config``. Runs the compilers to ask for their versions."""
    facts = [
        ("fi_backend", __version__),
        ("sources", str(paths.CSRC)),
        ("python", platform.python_version()),
        ("tvm-ffi", _try(paths.tvm_ffi_version)),
        ("platform", f"{platform.system()} {platform.machine()}"),
        ("CPU level", f"{_try(isa.resolve)} (this machine: {isa.host_level()})"),
        ("CUDA GPUs", ", ".join(f"{a}.{b}" for a, b in arch.detect()) or "none"),
        ("CUDA targets", _try(lambda: " ".join(map(str, arch.resolve())))),
        ("C++ compiler", _compiler("cpu")),
        ("nvcc", _compiler("cuda")),
        ("ninja", toolchain.find_ninja() or "none"),
        ("kernel cache", _cache()),
        ("prebuilt", ", ".join(map(str, store.aot_roots())) or "none"),
    ]
    lines = [f"{name:<13} {value}" for name, value in facts]
    lines += ["", *table(("variable", "value", "from", "meaning"), map(_variable, env.VARIABLES))]
    unknown = env.unknown_names()
    if unknown:
        lines += ["", f"WARNING: set but unknown, misspelt? {', '.join(unknown)}"]
    return lines


def _variable(variable: env.Variable) -> tuple[str, str, str, str]:
    try:
        value = variable.get()
    except FiBackendError as error:
        value = f"ERROR: {error}"
    if isinstance(value, tuple):
        value = " ".join(value)
    shown = "-" if value is None or value == "" else str(value)
    return variable.name, shown, variable.source() or "default", variable.meaning


def _try(function: object) -> str:
    assert callable(function)
    try:
        return str(function())
    except FiBackendError as error:
        return f"unknown: {error}"


def _compiler(target: str) -> str:
    found = toolchain.find_nvcc() if target == "cuda" else toolchain.find_cxx()
    if found is None:
        return "none"
    words = found if isinstance(found, str) else " ".join(found)
    return f"{words}: {_try(lambda: toolchain.describe(target).versions[-1])}"


def _cache() -> str:
    roots = store.read_roots()
    if not roots:
        return f"{store.base_dir()} (not made yet)"
    entries = store.all_entries(prebuilt=False)
    size = sum(_size(directory) for directory in entries)
    return f"{', '.join(map(str, roots))} ({len(entries)} modules, {size / 1e6:.1f} MB)"


def _size(directory: os.PathLike[str]) -> int:
    return sum(item.stat().st_size for item in os.scandir(directory))


def status_lines(
    wanted: Sequence[KernelSpec] | None, name_filter: str, *, detailed: bool
) -> list[str]:
    """Return the report of ``module-status``: of the wanted specs, or of everything on disk."""
    if wanted is not None:
        asked = [_wanted(spec) for spec in dict.fromkeys(wanted) if name_filter in spec.name]
        return [*table(("module", "target", "state"), asked), "", _summary(r[2] for r in asked)]
    found = [item for item in registry.built() if name_filter in item.name]
    states = [_state(item) for item in found]
    targets = [item.manifest.spec["target"] if item.manifest else "?" for item in found]
    names = [item.name for item in found]
    heading, *rows = table(("module", "target", "state"), zip(names, targets, states, strict=True))
    lines = [heading]
    for row, item in zip(rows, found, strict=True):
        lines += [row, *(_details(item) if detailed else [])]
    return [*lines, "", _summary(states)]


def _wanted(spec: KernelSpec) -> tuple[str, str, str]:
    try:
        directory = store.find(resolve(spec))
    except FiBackendError as error:
        return spec.name, spec.target, f"unavailable: {error}"
    return spec.name, spec.target, "missing" if directory is None else "ready"


def _state(item: registry.Built) -> str:
    if item.problem:
        return "unusable"
    return "ready (prebuilt)" if item.prebuilt else "ready"


def _summary(states: Iterable[str]) -> str:
    states = list(states)
    ready = sum(state.startswith("ready") for state in states)
    return f"{len(states)} modules, {ready} ready"


def _details(item: registry.Built) -> list[str]:
    lines = [f"path: {item.directory}"]
    if item.problem:
        lines.append(f"reason: {item.problem}")
    if item.manifest is not None:
        manifest = item.manifest
        machine = " ".join(manifest.archs) or manifest.level
        values = ", ".join(f"{k}={v!r}" for k, v in manifest.kernel_spec.parameters)
        lines += [
            f"parameters: {values or '-'}",
            f"for: {machine}; {'; '.join(manifest.compilers)}; tvm-ffi {manifest.tvm_ffi}",
            f"size: {manifest.size / 1e3:.0f} kB; compiled in {manifest.seconds:.1f} s",
        ]
    return [f"    {line}" for line in lines]
