"""Build many modules as one parallel ninja graph, each under its own lock, each published whole."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from fi_backend import env
from fi_backend.errors import BuildError, MissingModuleError
from fi_backend.jit import entry, key, ninja, paths, progress, render, runner, store, toolchain
from fi_backend.jit.kernel_spec import KernelSpec
from fi_backend.jit.lock import BuildLock
from fi_backend.jit.request import Request, resolve

_log = logging.getLogger("fi_backend.jit")


@dataclass(frozen=True)
class BuildReport:
    """Names of the modules that :func:`build` compiled and of those that were there already."""

    built: tuple[str, ...]
    reused: tuple[str, ...]
    seconds: float


def build(
    specs: Iterable[KernelSpec], *, progress: progress.ProgressCallback | None = None
) -> BuildReport:
    """Make sure that every module is on disk; compile what is missing in one parallel graph.

    Loads nothing: neither tvm-ffi nor torch is imported.

    Args:
        specs: the modules; duplicates are allowed.
        progress: called with (finished commands, all commands, last one); default: one line on a
            terminal, log lines elsewhere.

    Raises:
        BuildError: at least one module does not compile. The others are published.
        ToolchainError: something must be compiled and there is no compiler.
        MissingModuleError: something must be compiled and ``FI_BACKEND_DISABLE_JIT`` is set.
        CacheLockTimeout: another process builds one of them for too long.
    """
    started = time.monotonic()
    requests = [resolve(spec) for spec in dict.fromkeys(specs)]
    missing = [request for request in requests if store.find(request) is None]
    ensure(missing, report=progress)
    absent = {request.spec for request in missing}
    return BuildReport(
        built=tuple(r.spec.name for r in requests if r.spec in absent),
        reused=tuple(r.spec.name for r in requests if r.spec not in absent),
        seconds=time.monotonic() - started,
    )


def ensure(
    requests: Iterable[Request],
    *,
    report: progress.ProgressCallback | None = None,
    rejected: Collection[Path] = (),
) -> dict[str, Path]:
    """Return ``{request.family: entry directory}``, building what is missing.

    Never waits for a lock while holding another. What is free is built first; then we wait for
    what others are building, and take theirs.
    """
    found: dict[str, Path] = {}
    pending = {request.family: request for request in requests}
    timeout = env.LOCK_TIMEOUT.get()
    while pending:
        _require_jit(pending.values())
        locks = {family: BuildLock(store.lock_path(r)) for family, r in pending.items()}
        try:
            held = [family for family, lock in locks.items() if lock.try_acquire()]
            if not held:
                held = [next(iter(pending))]
                progress.ensure_visible()
                _log.info("waiting for another process to build %s", held[0])
                locks[held[0]].acquire(timeout)
            todo = []
            for family in held:
                ready = store.find(pending[family], rejected)
                if ready is not None:  # somebody else finished it before we had the lock
                    found[family] = ready
                    locks[family].release()
                else:
                    todo.append(pending[family])
            if todo:
                found |= _compile(todo, locks, report)
        finally:
            for lock in locks.values():
                lock.release()
        pending = {family: r for family, r in pending.items() if family not in found}
    return found


def _require_jit(requests: Iterable[Request]) -> None:
    if env.DISABLE_JIT.get():
        names = ", ".join(request.spec.name for request in requests)
        raise MissingModuleError(
            f"{env.DISABLE_JIT.name} is set and no prebuilt module fits: {names}; build them with "
            f"`fi-backend aot` and set {env.AOT_DIR.name}, or run `fi-backend warmup` first, or "
            f"unset {env.DISABLE_JIT.name}; `fi-backend module-status --detailed` lists them"
        )


def _compile(
    requests: list[Request],
    locks: dict[str, BuildLock],
    report: progress.ProgressCallback | None,
) -> dict[str, Path]:
    """Build requests whose locks we hold as one graph; publish each as soon as it is linked."""
    chains = {target: toolchain.describe(target) for target in {r.spec.target for r in requests}}
    modules = {r.family: _prepare(r, chains[r.spec.target], locks[r.family]) for r in requests}
    by_family = {r.family: r for r in requests}
    published: dict[str, Path] = {}
    started = time.monotonic()

    def publish(family: str) -> None:
        request, module = by_family[family], modules[family]
        if key.source_key(request.spec) != request.source_key:
            raise BuildError(
                f"the sources of {request.spec.name} changed while it was compiled; run again",
                modules=(request.spec.name,),
                command="",
                log="",
            )
        _write_manifest(request, module, time.monotonic() - started)
        published[family] = store.publish(module.directory, request)
        locks[family].release()

    failures = runner.run(
        modules,
        ninja_program=next(iter(chains.values())).ninja,
        scratch=store.write_root() / "tmp",
        report=report or progress.console([r.spec.name for r in requests]),
        on_linked=publish,
    )
    if failures:
        raise _build_error(failures, modules, by_family)
    return published


def _prepare(request: Request, chain: toolchain.Toolchain, lock: BuildLock) -> ninja.Module:
    spec = request.spec
    units = render.render(spec)
    directory = store.new_build_dir(request, is_only_builder=lock.keeps_others_out)
    for unit, text in units.items():
        (directory / unit).write_text(text, encoding="utf-8")
    return ninja.Module(
        name=request.family,
        directory=directory,
        published=store.destination(request),
        units=tuple(units),
        flags=request.flags,
        include_dirs=paths.include_dirs(paths.source_roots(spec)),
        tvm_ffi=paths.tvm_ffi_dir(),
        toolchain=chain,
        nvcc_threads=env.NVCC_THREADS.get(),
    )


def _write_manifest(request: Request, module: ninja.Module, seconds: float) -> None:
    library = (module.directory / entry.LIBRARY).read_bytes()
    for unit in module.units:
        (module.directory / ninja.object_name(unit)).unlink(missing_ok=True)
    entry.write_manifest(
        module.directory,
        entry.Manifest(
            format=entry.FORMAT,
            spec=request.spec.as_dict(),
            source_key=request.source_key,
            flags_key=request.flags_key,
            level=request.level,
            archs=tuple(map(str, request.archs)),
            tvm_ffi=paths.tvm_ffi_version(),
            compilers=module.toolchain.versions,
            files=module.toolchain.files,
            needs=entry.system_needs(library),
            size=len(library),
            sha256=hashlib.sha256(library).hexdigest(),
            seconds=round(seconds, 3),
            created=time.time(),
        ),
    )


def _build_error(
    failures: list[runner.Failure],
    modules: dict[str, ninja.Module],
    requests: dict[str, Request],
) -> BuildError:
    first = failures[0]
    keys = sorted({failure.key for failure in failures} & set(modules)) or sorted(modules)
    names = tuple(requests[key].spec.name for key in keys)
    kept = ", ".join(str(modules[key].directory) for key in keys)
    log = "\n".join(failure.log for failure in failures)
    return BuildError(
        f"compiling {', '.join(names)} failed.\n"
        f"command: {first.command}\n"
        f"last lines of its output:\n{first.tail()}\n"
        f"The sources are kept in {kept} until the next attempt. If the compiler is at fault, set "
        f"{env.CXX.name} or {env.NVCC.name} to another one; {env.JIT_VERBOSE.name}=1 shows all "
        "output.",
        modules=names,
        command=first.command,
        log=log,
    )
