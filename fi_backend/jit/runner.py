"""Run one ninja graph: follow its output, notice finished modules, collect failures."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fi_backend import env
from fi_backend.jit import affinity, ninja, toolchain
from fi_backend.jit.entry import LIBRARY
from fi_backend.jit.progress import ProgressCallback

_STATUS = re.compile(r"\[(\d+)/(\d+)\] (.*)")
_TAIL_LINES = 40


@dataclass
class Failure:
    """One failed command.

    Attributes:
        key: name of the module it belongs to, empty where ninja itself failed.
        command: as the shell saw it.
        lines: what it printed.
    """

    key: str
    command: str
    lines: list[str] = field(default_factory=list)

    @property
    def log(self) -> str:
        return "\n".join([self.command, *self.lines])

    def tail(self) -> str:
        """Return its last lines."""
        return "\n".join(self.lines[-_TAIL_LINES:])


def run(
    modules: Mapping[str, ninja.Module],
    *,
    ninja_program: str,
    scratch: Path,
    report: ProgressCallback,
    on_linked: Callable[[str], None],
) -> list[Failure]:
    """Build the modules; one that fails does not stop the others.

    Args:
        modules: by their name; directories are prepared.
        ninja_program: path of ninja.
        scratch: existing directory for the graph.
        report: called after every command.
        on_linked: called with the name of every finished module, while others still compile.

    Returns:
        The failed commands, empty on success.
    """
    where = Path(tempfile.mkdtemp(prefix="graph.", dir=scratch))
    (where / "build.ninja").write_text(ninja.graph(list(modules.values())), encoding="utf-8")
    command = [ninja_program, "-C", str(where), "-j", str(affinity.jobs()), "-k", "0"]
    reader = _Reader(modules, report, on_linked)
    try:
        with affinity.every_allowed_core():
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                stdin=subprocess.DEVNULL,
                env={**toolchain.child_environ(), "NINJA_STATUS": "[%f/%t] "},
            )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                reader.feed(line.rstrip("\n"))
            status = process.wait()
        finally:
            _stop(process)
            if process.stdout is not None:
                process.stdout.close()
    finally:
        shutil.rmtree(where, ignore_errors=True)
    if status != 0 and not reader.failures:
        reader.failures.append(Failure("", " ".join(command), reader.other))
    return reader.failures


def _stop(process: subprocess.Popen[str]) -> None:
    """End ninja if it still runs; asked politely, it ends its compilers too."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _Reader:
    """Reads ninja's output: a status line per finished command, then what that command printed."""

    def __init__(
        self,
        modules: Mapping[str, ninja.Module],
        report: ProgressCallback,
        on_linked: Callable[[str], None],
    ) -> None:
        self.failures: list[Failure] = []
        self.other: list[str] = []
        self._modules = modules
        self._report = report
        self._on_linked = on_linked
        self._echo = env.JIT_VERBOSE.get()
        self._current: Failure | None = None
        if self._echo:
            for module in modules.values():
                commands = [ninja.compile_command(module, unit) for unit in module.units]
                for words in (*commands, ninja.link_command(module)):
                    print("fi_backend:", " ".join(words), file=sys.stderr)

    def feed(self, line: str) -> None:
        if self._echo:
            print("fi_backend:", line, file=sys.stderr)
        if status := _STATUS.fullmatch(line):
            self._current = None
            self._finished(int(status[1]), int(status[2]), status[3])
        elif line.startswith("FAILED: "):
            self._current = Failure(self._owner(line), "")
            self.failures.append(self._current)
        elif line.startswith("ninja: build stopped"):
            self._current = None
        elif self._current is None:
            self.other.append(line)
        elif not self._current.command:
            self._current.command = line
        else:
            self._current.lines.append(line)

    def _finished(self, done: int, total: int, what: str) -> None:
        self._report(done, total, what)
        key = what.removeprefix(ninja.LINKED)
        # The status line of a failed command looks the same: only success leaves the library.
        module = self._modules.get(key) if what.startswith(ninja.LINKED) else None
        if module is not None and (module.directory / LIBRARY).is_file():
            self._on_linked(key)

    def _owner(self, line: str) -> str:
        for key, module in self._modules.items():
            if str(module.directory) in line:
                return key
        return ""
