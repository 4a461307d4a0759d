"""What can be compiled (families of templates) and what has been (entries on disk).

Reads files only: no module of kernels is imported, and torch is not needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fi_backend.errors import FiBackendError
from fi_backend.jit import entry, paths, store
from fi_backend.jit.kernel_spec import KernelSpec
from fi_backend.jit.request import resolve

_PRINTED = re.compile(r"{{-?\s*([A-Za-z_]\w*)")
_SUMMARY = re.compile(r"\A\s*(?://|{#-?)\s*(.+?)\s*(?:-?#})?\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Family:
    """Templates that belong together: ``x.cu.j2`` and its ``x_binding.cc.j2`` are one family.

    Attributes:
        name: stem they share.
        target: ``"cpu"`` or ``"cuda"``.
        templates: file names.
        parameters: names of the template parameters.
        summary: the first comment line of the first template.
    """

    name: str
    target: str
    templates: tuple[str, ...]
    parameters: tuple[str, ...]
    summary: str


def families(directory: Path | None = None) -> list[Family]:
    """Return the families of a templates directory (default: ours), sorted by name."""
    directory = paths.CSRC / "templates" if directory is None else directory
    groups: dict[str, list[Path]] = {}
    for path in sorted(directory.glob("**/*.j2")):
        stem = path.name.partition(".")[0].removesuffix("_binding")
        groups.setdefault(stem, []).append(path)
    return [_family(name, files) for name, files in sorted(groups.items())]


def _family(name: str, files: list[Path]) -> Family:
    texts = [path.read_text(encoding="utf-8") for path in files]
    summary = _SUMMARY.match(texts[0])
    cuda = any(path.name.endswith(".cu.j2") for path in files) or "cuda" in name
    return Family(
        name=name,
        target="cuda" if cuda else "cpu",
        templates=tuple(path.name for path in files),
        parameters=tuple(sorted({p for text in texts for p in _PRINTED.findall(text)})),
        summary=summary[1] if summary else "",
    )


@dataclass(frozen=True)
class Built:
    """One entry on disk.

    Attributes:
        directory: where it is.
        prebuilt: in an AOT directory rather than the cache.
        manifest: None where it cannot be read.
        problem: why a load would not use it now; empty if it would.
    """

    directory: Path
    prebuilt: bool
    manifest: entry.Manifest | None
    problem: str

    @property
    def name(self) -> str:
        """Module name: that of the family directory without its key."""
        return self.directory.parent.name.rpartition("-")[0]


def built() -> list[Built]:
    """Return every entry, prebuilt ones first, with what a load would make of it now."""
    return [
        _status(directory, prebuilt=prebuilt)
        for prebuilt in (True, False)
        for directory in store.all_entries(prebuilt=prebuilt)
    ]


def _status(directory: Path, *, prebuilt: bool) -> Built:
    manifest = None
    try:
        manifest = entry.read_manifest(directory)
        request = resolve(manifest.kernel_spec)
        if not prebuilt and directory.name != request.entry and request.drivers is not None:
            raise entry.UnfitEntryError("built for other sources, flags, CPU, GPU or compiler")
        store.check(directory, request, prebuilt=prebuilt)
    except (entry.UnfitEntryError, FiBackendError, OSError, ValueError) as error:
        return Built(directory, prebuilt, manifest, str(error))
    return Built(directory, prebuilt, manifest, "")


def cached_specs() -> list[KernelSpec]:
    """Return the specs of all entries in the cache whose templates still exist, each once."""
    return list(dict.fromkeys(_manifest_specs()))


def _manifest_specs() -> Iterator[KernelSpec]:
    for directory in store.all_entries(prebuilt=False):
        try:
            spec = entry.read_manifest(directory).kernel_spec
            for template in spec.templates:
                paths.template_path(spec, template)
        except (entry.UnfitEntryError, ValueError, TypeError, FileNotFoundError):
            continue  # unreadable, or of a version whose templates had other names
        yield spec
