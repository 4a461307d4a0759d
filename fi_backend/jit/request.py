"""A KernelSpec resolved against this machine: which entry of a cache would serve it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from fi_backend.jit import arch, flags, isa, key, toolchain
from fi_backend.jit.kernel_spec import KernelSpec


@dataclass(frozen=True)
class Request:
    """What :func:`resolve` found out, without running a program.

    Attributes:
        spec: the module asked for.
        source_key: digest of all text it is compiled from.
        flags: complete flags, those of the instruction set or GPU architectures included.
        flags_key: digest of the flags that do not choose a machine, and of the platform.
        level: CPU instruction set level.
        archs: CUDA targets; empty for the CPU target.
        drivers: stamps of the compilers; None where there is no compiler.
    """

    spec: KernelSpec
    source_key: str
    flags: flags.Flags
    flags_key: str
    level: str
    archs: tuple[arch.Arch, ...]
    drivers: tuple[str, ...] | None

    @property
    def family(self) -> str:
        """Directory name of all builds of this text: ``<name>-<source key>``."""
        return f"{self.spec.name}-{self.source_key}"

    @property
    def variant(self) -> str:
        """Digest of flags, machine and platform: the builds that are alike but for the compiler."""
        return key.digest(self.flags_key, asdict(self.flags), length=12)

    @property
    def entry(self) -> str:
        """Directory name of the build that this machine's compilers would make."""
        return f"{self.variant}-{key.digest(*(self.drivers or ()), length=12)}"


def resolve(spec: KernelSpec, *, level: str | None = None) -> Request:
    """Return the request that ``spec`` is on this machine, under the current environment.

    Args:
        spec: the module.
        level: CPU instruction set to compile for on behalf of another machine; default: ours.

    Raises:
        UnsupportedError: the spec does not support an architecture asked for.
        EnvironmentVariableError: a variable does not parse.
        ToolchainError: no CUDA architecture can be told.
    """
    common = flags.common(spec)
    archs: tuple[arch.Arch, ...] = ()
    if spec.target == "cuda":
        archs = arch.select(arch.resolve(), spec.supported_majors, module=spec.name)
    # The host code of a CUDA module is glue: one portable build serves every CPU.
    level = (level or isa.resolve()) if spec.target == "cpu" else "generic"
    return Request(
        spec=spec,
        source_key=key.source_key(spec),
        flags=flags.for_machine(common, level, archs),
        flags_key=key.digest(asdict(common), key.platform_key()),
        level=level,
        archs=archs,
        drivers=toolchain.drivers(spec.target),
    )
