"""The cache on disk: where it is, whose it is, finding an entry and publishing one.

::

    <base>/jit-v1/            0700, ours alone
        kernels/<name>-<source key>/<variant>-<compiler>/{module.so, manifest.json, *.cc, *.cu}
        locks/                one lock file per entry
        tmp/                  builds in progress

Nothing is created before the first build. A base that cannot be used (read-only home, another
user's directory) is replaced by a private directory under the system's temporary one.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from fi_backend import env
from fi_backend.jit import entry, isa
from fi_backend.jit.request import Request

_log = logging.getLogger("fi_backend.jit")

ROOT = "jit-v1"
KERNELS = "kernels"
AOT_PACKAGE = "fi_backend_aot"
_LEFTOVER_SECONDS = 24 * 3600.0
_said: set[str] = set()
_chosen: dict[Path | None, Path] = {}  # base -> root that writes go to


def base_dir() -> Path | None:
    """Return the configured directory, existing or not; None where there is no home either."""
    if (configured := env.CACHE_DIR.get()) is not None:
        return configured
    if (workspace := env.WORKSPACE_BASE.get()) is not None:
        return workspace / ".cache" / "fi_backend"
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):
        return Path(xdg) / "fi_backend"
    try:
        return Path.home() / ".cache" / "fi_backend"
    except RuntimeError:
        return None


def aot_roots() -> list[Path]:
    """Return the directories of prebuilt entries: ``FI_BACKEND_AOT_DIR``, then an AOT wheel."""
    configured = env.AOT_DIR.get()
    wheel = importlib.util.find_spec(AOT_PACKAGE)
    found = list(wheel.submodule_search_locations or []) if wheel is not None else []
    return [Path(root) for root in (configured, *found) if root is not None]


def _fallback_base() -> Path:
    # Not tempfile.gettempdir(), which writes a file to find out whether it can.
    return Path(os.environ.get("TMPDIR") or "/tmp") / f"fi_backend-{os.geteuid()}"


def read_roots() -> list[Path]:
    """Return the existing roots that are private to us, the one written to first."""
    base, fallback = base_dir(), _fallback_base()
    roots = [_chosen[base]] if base in _chosen else []
    if base is not None:
        roots.append(base / ROOT)
    if _is_private(fallback):
        roots.append(fallback / ROOT)
    return [root for root in dict.fromkeys(roots) if _is_private(root)]


def write_root() -> Path:
    """Return the root that builds go to, made if need be; falls back and says so once."""
    base = base_dir()
    root = _chosen.get(base)
    if root is None or not _is_private(root):
        root = _chosen[base] = _make_root(base)
    return root


def _make_root(base: Path | None) -> Path:
    try:
        if base is None:
            raise OSError("there is no home directory")
        return _make_private(base)
    except OSError as error:
        reason = error
    fallback = _fallback_base()
    try:
        fallback.mkdir(mode=0o700, exist_ok=True)
        if not _is_private(fallback):
            raise PermissionError(f"{fallback} is not private to uid {os.geteuid()}")
        root = _make_private(fallback)
    except OSError:
        root = _make_private(Path(tempfile.mkdtemp(prefix=f"fi_backend-{os.geteuid()}-")))
    _log.warning(
        "kernel cache %s cannot be used (%s); compiled kernels go to %s; set %s to a directory "
        "that stays",
        base,
        reason,
        root,
        env.CACHE_DIR.name,
    )
    return root


def _make_private(base: Path) -> Path:
    """Make ``base/jit-v1`` with its folders, closed to others.

    Raises:
        OSError: it cannot be made, written, or is not ours.
    """
    root = base / ROOT
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    root.mkdir(mode=0o700, exist_ok=True)
    status = os.lstat(root)
    if status.st_uid == os.geteuid() and stat.S_ISDIR(status.st_mode) and status.st_mode & 0o077:
        root.chmod(0o700)
    if not _is_private(root):
        raise PermissionError(f"{root} is not a directory of uid {os.geteuid()}")
    for name in (KERNELS, "locks", "tmp"):
        (root / name).mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryFile(dir=root / "tmp"):  # a read-only file system answers here
        return root


def _is_private(directory: Path) -> bool:
    try:
        status = os.lstat(directory)
    except OSError:
        return False
    closed = not status.st_mode & 0o077
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and closed


def find(request: Request, rejected: Collection[Path] = ()) -> Path | None:
    """Return the entry that serves a request: prebuilt ones first, then the cache.

    Runs no program. A prebuilt entry serves if its text and flags are the same and this machine can
    run it; a cached one must also have been made by the compiler that is here now, unless there is
    none here.
    """
    for directory in _prebuilt(request):
        if directory not in rejected and _passes(directory, request, prebuilt=True):
            return directory
    for directory in _cached(request):
        if directory not in rejected and _passes(directory, request, prebuilt=False):
            return directory
    return None


def check(directory: Path, request: Request, *, prebuilt: bool) -> None:
    """Require that an entry may be loaded for a request.

    A prebuilt directory is as trusted as the package itself: who owns it, and which compiler made
    it, does not matter.

    Raises:
        UnfitEntryError: says why not.
    """
    if not prebuilt:
        entry.check_owner(directory)
    manifest = entry.read_manifest(directory)
    entry.check_fit(manifest, request)
    if not prebuilt and request.drivers is not None:
        entry.check_compiler(manifest)
    entry.check_library(directory, manifest)


def _passes(directory: Path, request: Request, *, prebuilt: bool) -> bool:
    try:
        check(directory, request, prebuilt=prebuilt)
    except entry.UnfitEntryError as error:
        # Several prebuilt variants of a module are normal, a cached entry that does not fit is not.
        level = logging.INFO if prebuilt else logging.WARNING
        message = f"not loading {directory}: {error}"
        if message not in _said:
            _said.add(message)
            _log.log(level, message)
        return False
    return True


def _prebuilt(request: Request) -> list[Path]:
    found = [d for root in aot_roots() for d in _entries(root / request.family)]

    def rank(directory: Path) -> int:
        try:
            return isa.LEVELS.index(entry.read_manifest(directory).level)
        except (entry.UnfitEntryError, ValueError):
            return len(isa.LEVELS)

    return sorted(found, key=rank) if len(found) > 1 else found


def _cached(request: Request) -> Iterator[Path]:
    for root in read_roots():
        family = root / KERNELS / request.family
        if request.drivers is not None:
            if (family / request.entry).is_dir():
                yield family / request.entry
            continue
        for directory in _entries(family):
            if directory.name.startswith(request.variant):
                yield directory


def _entries(family: Path) -> list[Path]:
    try:
        return sorted(path for path in family.iterdir() if "." not in path.name)
    except OSError:
        return []


def all_entries(*, prebuilt: bool) -> list[Path]:
    """Return every entry directory: of the AOT directories, or of the cache."""
    roots = aot_roots() if prebuilt else [root / KERNELS for root in read_roots()]
    return [
        directory for root in roots for family in _entries(root) for directory in _entries(family)
    ]


def destination(request: Request) -> Path:
    """Return where the build of a request is published."""
    return write_root() / KERNELS / request.family / request.entry


def lock_path(request: Request) -> Path:
    """Return the lock file of a request's build."""
    return write_root() / "locks" / f"{request.family}.{request.entry}"


def new_build_dir(request: Request, *, is_only_builder: bool) -> Path:
    """Return a fresh build directory, and remove those of dead builders.

    Args:
        request: the entry to be built.
        is_only_builder: the caller holds a build lock that keeps others out, so nobody alive uses
            another directory of the same entry. Those of other entries (failed, then never tried
            again), and without such a lock all, go when they are old.
    """
    prefix = f"{request.family}.{request.entry}."
    parent = write_root() / "tmp"
    for leftover in parent.iterdir():
        is_dead = is_only_builder and leftover.name.startswith(prefix)
        if is_dead or _age(leftover) > _LEFTOVER_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))


def _age(directory: Path) -> float:
    try:
        return time.time() - directory.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def publish(built: Path, request: Request) -> Path:
    """Move a complete build directory to its place by one rename; return that place."""
    target = destination(request)
    family = target.parent
    family.mkdir(mode=0o700, exist_ok=True)
    if not _is_private(family):  # somebody with more rights left it here
        discard(family)
        family.mkdir(mode=0o700)
    discard(target)
    os.rename(built, target)
    return target


def discard(directory: Path) -> None:
    """Remove an entry if it is there; nobody sees a half-removed one."""
    aside = directory.with_name(f"{directory.name}.{secrets.token_hex(4)}")
    try:
        os.rename(directory, aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside, ignore_errors=True)


def clear() -> list[Path]:
    """Remove every cache root of ours and return those that were there."""
    roots = read_roots()
    for root in roots:
        shutil.rmtree(root)
    _chosen.clear()
    return roots
