"""Where sources and headers are: ours, an out-of-tree root's, and tvm-ffi's."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path

from fi_backend.errors import ToolchainError
from fi_backend.jit.kernel_spec import KernelSpec

CSRC = Path(__file__).resolve().parent.parent / "csrc"


def source_roots(spec: KernelSpec) -> tuple[Path, ...]:
    """Return the directories that hold ``templates/`` and headers, in search order."""
    return (CSRC,) if spec.root is None else (Path(spec.root), CSRC)


def include_dirs(roots: tuple[Path, ...]) -> tuple[Path, ...]:
    """Return the include directories that the roots bring along."""
    return tuple(directory for root in roots for directory in (root, root / "include"))


def template_path(spec: KernelSpec, template: str) -> Path:
    """Return the file of a template.

    Raises:
        FileNotFoundError: no root has it.
    """
    candidates = [root / "templates" / template for root in source_roots(spec)]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{spec.name}: no template {template!r}; looked at {', '.join(map(str, candidates))}"
    )


@lru_cache(maxsize=1)
def tvm_ffi_version() -> str:
    """Return the installed tvm-ffi version without importing it (its import brings torch)."""
    import importlib.metadata

    try:
        return importlib.metadata.version("apache-tvm-ffi")
    except importlib.metadata.PackageNotFoundError:
        raise ToolchainError(
            "apache-tvm-ffi is not installed; run: pip install 'apache-tvm-ffi>=0.1.11,<0.2'"
        ) from None


@lru_cache(maxsize=1)
def tvm_ffi_dir() -> Path:
    """Return the directory of the tvm_ffi package, which has ``include`` and ``lib``."""
    found = importlib.util.find_spec("tvm_ffi")
    if found is None or found.origin is None:
        raise ToolchainError(
            "tvm_ffi cannot be found; run: pip install 'apache-tvm-ffi>=0.1.11,<0.2'"
        )
    return Path(found.origin).resolve().parent
