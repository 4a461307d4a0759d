"""Build modules ahead of time, into a directory or a wheel that runs with the JIT disabled."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import platform
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from fi_backend import __version__
from fi_backend.jit import builder, paths, store
from fi_backend.jit.kernel_spec import KernelSpec
from fi_backend.jit.progress import ProgressCallback
from fi_backend.jit.request import Request, resolve

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest a zip can say: the same modules give the same wheel
_INIT = '"""Kernels of fi_backend, compiled ahead of time. Found by fi_backend itself."""\n'


def build_directory(
    specs: Iterable[KernelSpec],
    out_dir: Path,
    *,
    levels: Sequence[str] = (),
    progress: ProgressCallback | None = None,
) -> list[Path]:
    """Build modules and put them into a directory for ``FI_BACKEND_AOT_DIR``.

    Args:
        specs: the modules.
        out_dir: made if missing; entries of earlier runs stay.
        levels: CPU instruction sets to build for; default: this machine's.
        progress: see :func:`fi_backend.jit.build`.

    Returns:
        The entry directories under ``out_dir``.

    Raises:
        JitError: see :func:`fi_backend.jit.build`.
    """
    unique = list(dict.fromkeys(specs))
    # The levels of one module are one family, and a graph holds a family once: a graph per level.
    graphs = [[resolve(spec) for spec in unique if spec.target == "cuda" or not levels]]
    for level in levels:
        graphs.append([resolve(spec, level=level) for spec in unique if spec.target == "cpu"])
    copies = []
    for graph in graphs:
        found = _ensure_cached(graph, progress)
        copies += [_copy(found[request.family], out_dir, request) for request in graph]
    return copies


def _ensure_cached(requests: list[Request], progress: ProgressCallback | None) -> dict[str, Path]:
    found = {r.family: path for r in requests if (path := store.find(r)) is not None}
    missing = [request for request in requests if request.family not in found]
    return found | builder.ensure(missing, report=progress)


def _copy(source: Path, out_dir: Path, request: Request) -> Path:
    family = out_dir / request.family
    family.mkdir(parents=True, exist_ok=True)
    target = family / source.name
    if source.resolve() == target.resolve():
        return target
    with tempfile.TemporaryDirectory(prefix=".copy-", dir=out_dir) as scratch:
        copied = Path(scratch) / source.name
        shutil.copytree(source, copied)
        store.discard(target)
        os.rename(copied, target)
    return target


def build_wheel(
    specs: Iterable[KernelSpec],
    out_dir: Path,
    *,
    levels: Sequence[str] = (),
    progress: ProgressCallback | None = None,
) -> Path:
    """Build modules into an installable wheel, which fi_backend finds once it is installed.

    Arguments and errors are those of :func:`build_directory`. The wheel requires the fi-backend
    and tvm-ffi versions it was built with, since modules of other versions would not be loaded.

    Returns:
        Path of the ``.whl`` in ``out_dir``.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    version = __version__
    tag = f"py3-none-{'linux' if os.name == 'posix' else os.name}_{platform.machine()}"
    info = f"{store.AOT_PACKAGE}-{version}.dist-info"
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=out_dir) as scratch:
        root = Path(scratch) / store.AOT_PACKAGE
        build_directory(specs, root, levels=levels, progress=progress)
        files = {
            f"{store.AOT_PACKAGE}/{path.relative_to(root).as_posix()}": path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }
    files[f"{store.AOT_PACKAGE}/__init__.py"] = _INIT.encode()
    files[f"{info}/METADATA"] = (
        "Metadata-Version: 2.1\n"
        f"Name: {store.AOT_PACKAGE.replace('_', '-')}\n"
        f"Version: {version}\n"
        "Summary: Kernels of fi-backend, compiled ahead of time\n"
        f"Requires-Dist: fi-backend=={version}\n"
        f"Requires-Dist: apache-tvm-ffi=={paths.tvm_ffi_version()}\n"
    ).encode()
    files[f"{info}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: fi-backend\nRoot-Is-Purelib: false\nTag: {tag}\n"
    ).encode()
    files[f"{info}/RECORD"] = _record(files, f"{info}/RECORD")
    wheel = out_dir / f"{store.AOT_PACKAGE}-{version}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            member = zipfile.ZipInfo(name, _EPOCH)
            member.external_attr = 0o644 << 16
            archive.writestr(member, data, zipfile.ZIP_DEFLATED)
    return wheel


def _record(files: dict[str, bytes], own_name: str) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for name, data in files.items():
        checksum = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        writer.writerow([name, f"sha256={checksum}", len(data)])
    writer.writerow([own_name, "", ""])
    return text.getvalue().encode()
