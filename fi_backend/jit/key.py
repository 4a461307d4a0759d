"""Content keys: what a module is made of decides where it is cached.

:func:`source_key` covers everything that decides the text a compiler sees: template bytes,
parameters, every header of ours that they reach, how we render, and the tvm-ffi version. It keys
template and parameters rather than rendered text, so that a warm load does not import jinja2.
Flags, target and compiler are digested apart (:func:`digest`), because a prebuilt module is also
good on a machine with a better CPU, or with no compiler.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from fi_backend.jit import paths
from fi_backend.jit.kernel_spec import KernelSpec

_DIRECTIVE = re.compile(rb"^[ \t]*#[ \t]*include(?:_next)?\b[ \t]*(.*?)[ \t\r]*$", re.MULTILINE)
_TARGET = re.compile(rb'([<"])([^<>"]+)[>"]')


def digest(*parts: object, length: int = 16) -> str:
    """Return a hexadecimal digest of JSON-ready parts; 1, 1.0, True and "1" all differ."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


class _Source(NamedTuple):
    size: int
    mtime_ns: int
    sha256: str
    includes: tuple[tuple[bool, str], ...]  # (quoted, path)


_sources: dict[str, _Source] = {}


def _read(path: str) -> _Source:
    """Return digest and includes of a file; reads it again only after it changed."""
    status = os.stat(path)
    known = _sources.get(path)
    if known is not None and known[:2] == (status.st_size, status.st_mtime_ns):
        return known
    data = Path(path).read_bytes()
    includes = tuple(_include(path, line) for line in _DIRECTIVE.findall(data))
    source = _Source(status.st_size, status.st_mtime_ns, hashlib.sha256(data).hexdigest(), includes)
    _sources[path] = source
    return source


def _include(path: str, operand: bytes) -> tuple[bool, str]:
    match = _TARGET.match(operand)
    name = match[2].decode() if match else ""
    if not name or "{{" in name:
        raise ValueError(
            f"{path}: cannot follow #include {operand.decode(errors='replace')}; write the header "
            "name out, or the cache would not notice when that header changes"
        )
    assert match is not None
    return match[1] == b'"', name


def closure(sources: list[str], include_dirs: tuple[Path, ...]) -> dict[str, str]:
    """Return ``{path: sha256}`` of the sources and of all headers of ours that they reach.

    Conditions are not evaluated: a header in a branch not taken counts too. Headers found nowhere
    in ``include_dirs`` are the system's or tvm-ffi's, which the key covers by version.
    """
    found: dict[str, str] = {}
    pending = list(sources)
    while pending:
        path = pending.pop()
        if path in found:
            continue
        source = _read(path)
        found[path] = source.sha256
        for quoted, name in source.includes:
            beside = [Path(path).parent] if quoted else []
            for directory in (*beside, *include_dirs):
                candidate = os.path.normpath(os.path.join(directory, name))
                if os.path.isfile(candidate):
                    pending.append(candidate)
                    break
    return found


@lru_cache(maxsize=1)
def _renderer() -> str:
    return hashlib.sha256(Path(__file__).with_name("render.py").read_bytes()).hexdigest()


def source_key(spec: KernelSpec) -> str:
    """Return the digest of all text that a module is compiled from."""
    roots = paths.source_roots(spec)
    templates = [str(paths.template_path(spec, template)) for template in spec.templates]
    files = closure(templates, paths.include_dirs(roots))
    contents = sorted((_relative(path, roots), sha256) for path, sha256 in files.items())
    identity = {k: v for k, v in spec.as_dict().items() if k != "root"}
    return digest(identity, contents, _renderer(), paths.tvm_ffi_version())


def _relative(path: str, roots: tuple[Path, ...]) -> str:
    """Name a file by its place under a root, so that a moved checkout keeps its cache."""
    for index, root in enumerate(reversed(roots)):
        if path.startswith(f"{root}{os.sep}"):
            return f"{index}:{path[len(str(root)) + 1 :]}"
    return path


def platform_key() -> str:
    """Return what an object file of this machine can be linked with."""
    return f"{sys.platform}-{platform.machine()}"
