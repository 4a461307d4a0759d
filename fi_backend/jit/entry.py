"""One built module on disk: its manifest, and the checks before anybody loads it.

An entry is a directory with ``module.so``, ``manifest.json`` and the rendered sources. Whatever is
wrong with one (truncated, written by somebody else, for another machine) makes it a miss.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fi_backend.jit import arch, isa, toolchain
from fi_backend.jit.kernel_spec import KernelSpec
from fi_backend.jit.request import Request

LIBRARY = "module.so"
MANIFEST = "manifest.json"
FORMAT = 1

_NEEDS = re.compile(rb"\b(GLIBC|GLIBCXX|CXXABI)_(\d+(?:\.\d+)+)\b")


class UnfitEntryError(Exception):
    """The entry must not be loaded; the text says why."""


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` records about a build.

    Attributes:
        format: layout version of entries.
        spec: the KernelSpec as JSON.
        source_key, flags_key: see :class:`~fi_backend.jit.request.Request`.
        level: CPU instruction set level.
        archs: CUDA targets as text.
        tvm_ffi: version it was compiled against.
        compilers: version texts.
        files: stamps of the compiler's programs.
        needs: newest symbol version wanted of each system library, ``{"GLIBC": "2.34"}``.
        size, sha256: of ``module.so``.
        seconds: compile time of the graph that made it.
        created: Unix time.
    """

    format: int
    spec: dict[str, Any]
    source_key: str
    flags_key: str
    level: str
    archs: tuple[str, ...]
    tvm_ffi: str
    compilers: tuple[str, ...]
    files: tuple[str, ...]
    needs: dict[str, str]
    size: int
    sha256: str
    seconds: float
    created: float

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec.from_dict(self.spec)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``, close the files to others, and flush what a load reads."""
    path = directory / MANIFEST
    path.write_text(json.dumps(asdict(manifest), indent=1), encoding="utf-8")
    for file in directory.iterdir():
        file.chmod(0o600)  # whatever the umask is
    for name in (LIBRARY, MANIFEST):
        descriptor = os.open(directory / name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of an entry.

    Raises:
        UnfitEntryError: there is none, or it is not one of ours.
    """
    try:
        data = json.loads((directory / MANIFEST).read_bytes())
        if data["format"] != FORMAT:
            raise UnfitEntryError(f"entry format {data['format']}, this version reads {FORMAT}")
        values = {field.name: data[field.name] for field in fields(Manifest)}
        for name in ("archs", "compilers", "files"):
            values[name] = tuple(values[name])
        return Manifest(**values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnfitEntryError(f"unreadable {MANIFEST}: {error}") from error


def check_owner(directory: Path) -> None:
    """Require that we, and nobody else, could have written an entry.

    Raises:
        UnfitEntryError: a part of it is owned by another user, writable by others, or a link.
    """
    for path in (directory.parent, directory, directory / LIBRARY, directory / MANIFEST):
        try:
            status = os.lstat(path)
        except OSError as error:
            raise UnfitEntryError(f"incomplete: {error}") from error
        if stat.S_ISLNK(status.st_mode):
            raise UnfitEntryError(f"{path} is a symbolic link")
        if status.st_uid != os.geteuid():
            raise UnfitEntryError(f"{path} is owned by uid {status.st_uid}, not {os.geteuid()}")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UnfitEntryError(f"{path} is writable by other users")


def check_library(directory: Path, manifest: Manifest) -> None:
    """Require that ``module.so`` is the file that the manifest describes.

    Raises:
        UnfitEntryError: it is missing, truncated or changed.
    """
    try:
        data = (directory / LIBRARY).read_bytes()
    except OSError as error:
        raise UnfitEntryError(f"unreadable {LIBRARY}: {error}") from error
    if len(data) != manifest.size:
        raise UnfitEntryError(f"{LIBRARY} has {len(data)} bytes, {manifest.size} were built")
    if hashlib.sha256(data).hexdigest() != manifest.sha256:
        raise UnfitEntryError(f"{LIBRARY} differs from what was built")


def check_fit(manifest: Manifest, request: Request) -> None:
    """Require that a build serves a request on this machine.

    Raises:
        UnfitEntryError: other text, other flags, a better CPU or other GPUs, a newer glibc.
    """
    if manifest.source_key != request.source_key:
        raise UnfitEntryError("built from other sources")
    if manifest.flags_key != request.flags_key:
        raise UnfitEntryError("built with other flags or for another platform")
    levels = isa.LEVELS
    if manifest.level not in levels or levels.index(manifest.level) < levels.index(request.level):
        raise UnfitEntryError(f"needs CPU level {manifest.level}, asked for {request.level}")
    built = [arch.parse_token(text) for text in manifest.archs]
    missing = [a for a in request.archs if not any(b.runs_on(a.major, a.minor) for b in built)]
    if missing:
        raise UnfitEntryError(
            f"built for CUDA {' '.join(manifest.archs)}, not for {' '.join(map(str, missing))}"
        )
    wanted = manifest.needs.get("GLIBC")
    if wanted and (here := _glibc()) and _version(wanted) > _version(here):
        raise UnfitEntryError(f"needs glibc {wanted}, this machine has {here}")


def check_compiler(manifest: Manifest) -> None:
    """Require that the programs that made a build are still the ones on this machine.

    Raises:
        UnfitEntryError: one was replaced.
    """
    for recorded in manifest.files:
        path = recorded.partition("|")[0]
        try:
            current = toolchain.stamp(path)
        except OSError:
            current = "missing"
        if current != recorded:
            raise UnfitEntryError(f"the compiler changed: {path}")


def system_needs(library: bytes) -> dict[str, str]:
    """Return the newest symbol version that a shared library wants of glibc and libstdc++."""
    newest: dict[str, str] = {}
    for name, version in {(m[1].decode(), m[2].decode()) for m in _NEEDS.finditer(library)}:
        if _version(version) > _version(newest.get(name, "0")):
            newest[name] = version
    return dict(sorted(newest.items()))


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def _glibc() -> str | None:
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (ValueError, OSError, AttributeError):
        return None
    return version if name == "glibc" else None
