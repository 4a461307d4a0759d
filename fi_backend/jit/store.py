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

import logging
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from fi_backend import env
from fi_backend.jit import entry, isa
from fi_backend.jit.request import Request

_log = logging.getLogger("fi_backend.jit")

ROOT = "jit-v1"
_chosen: dict[Path | None, Path] = {}  # base -> root that writes go to
_warned: set[str] = set()


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


def _fallback_base() -> Path:
    return Path(tempfile.gettempdir()) / f"fi_backend-{os.geteuid()}"


def read_roots() -> list[Path]:
    """Return the existing roots that are private to us, the one written to first."""
    base = base_dir()
    candidates = [_chosen[base]] if base in _chosen else []
    candidates += [b / ROOT for b in (base, _fallback_base()) if b is not None]
    return [root for root in dict.fromkeys(candidates) if _is_private(root)]


def write_root() -> Path:
    """Return the root that builds go to, made if need be; falls back and says so once."""
    base = base_dir()
    if base not in _chosen:
        _chosen[base] = _choose(base)
    return _chosen[base]


def _choose(base: Path | None) -> Path:
    reason = "there is no home directory"
    for candidate in filter(None, (base, _fallback_base())):
        try:
            return _make_private(candidate)
        except OSError as error:
            reason = reason if candidate is not base else str(error)
            continue
        finally:
            pass
    return _make_private(Path(tempfile.mkdtemp(prefix=f"fi_backend-{os.geteuid()}-")))


def _make_private(base: Path) -> Path:
    root = base / ROOT
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    root.mkdir(mode=0o700, exist_ok=True)
    if not _is_private(root):
        raise PermissionError(f"{root} belongs to another user or is open to others")
    for name in ("kernels", "locks", "tmp"):
        (root / name).mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryFile(dir=root / "tmp"):  # a read-only file system answers here
        pass
    return root


def _is_private(root: Path) -> bool:
    try:
        status = os.lstat(root)
    except OSError:
        return False
    return (
        stat.S_ISDIR(status.st_mode)
        and status.st_uid == os.geteuid()
        and not status.st_mode & 0o077
    )
