"""KernelSpec: what one compiled module is made of. Data only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

Parameter: TypeAlias = str | int | bool | float
TARGETS = ("cpu", "cuda")

_NAME = re.compile(r"[A-Za-z0-9_]{1,120}")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TEMPLATE = re.compile(r".*\.(cc|cu)\.j2")


@dataclass(frozen=True)
class KernelSpec:
    """A module to compile: templates, their parameters, and flags.

    Attributes:
        name: readable and unique per parameter set, ``[A-Za-z0-9_]+``: ``"rmsnorm_cpu_bf16"``.
        target: ``"cpu"`` (g++) or ``"cuda"`` (nvcc for ``.cu``, g++ for ``.cc``).
        templates: file names under ``csrc/templates``; ``x.cc.j2`` and ``x.cu.j2`` each render to
            one translation unit.
        parameters: ``(name, value)`` pairs sorted by name; every template sees all of them, and
            each must be used by at least one.
        extra_cflags: added to every C++ compile command.
        extra_cuda_cflags: added to every nvcc command.
        extra_ldflags: added to the link command.
        supported_majors: CUDA compute capability majors it can be compiled for; None: all.
        root: directory with ``templates/`` and headers that is searched before ours, for kernels
            that live outside this package.

    Raises:
        ValueError: a field is malformed.
    """

    name: str
    target: Literal["cpu", "cuda"]
    templates: tuple[str, ...]
    parameters: tuple[tuple[str, Parameter], ...] = ()
    extra_cflags: tuple[str, ...] = ()
    extra_cuda_cflags: tuple[str, ...] = ()
    extra_ldflags: tuple[str, ...] = ()
    supported_majors: tuple[int, ...] | None = None
    root: str | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name must match {_NAME.pattern}, got {self.name!r}")
        if self.target not in TARGETS:
            raise ValueError(f"{self.name}: target must be one of {TARGETS}, got {self.target!r}")
        bad = [t for t in self.templates if not _TEMPLATE.fullmatch(t)]
        if bad or not self.templates:
            raise ValueError(
                f"{self.name}: templates must be names ending in .cc.j2 or .cu.j2, "
                f"got {self.templates}"
            )
        if self.target == "cpu" and any(t.endswith(".cu.j2") for t in self.templates):
            raise ValueError(f"{self.name}: target 'cpu' takes no .cu.j2, got {self.templates}")
        units = [template.rpartition("/")[2] for template in self.templates]
        if len(set(units)) != len(units):
            raise ValueError(f"{self.name}: templates must differ in file name, got {units}")
        names = [name for name, _ in self.parameters]
        if names != sorted(set(names)) or not all(map(_IDENTIFIER.fullmatch, names)):
            raise ValueError(
                f"{self.name}: parameter names must be identifiers, unique and sorted, got {names}"
            )

    @property
    def identity(self) -> str:
        """Text that differs whenever any field does; ``1``, ``1.0`` and ``True`` differ too."""
        return repr(self)

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form; :meth:`from_dict` inverts it."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KernelSpec:
        """Build a spec from :meth:`as_dict` output that went through JSON."""
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in data.items()
        }
        values["parameters"] = tuple((name, value) for name, value in values["parameters"])
        return cls(**values)
