"""A compiler that records its own runs."""

from __future__ import annotations

import shutil
from pathlib import Path

_COMPILER = """\
#!/bin/sh
case " $* " in
  *" -c "*) stage=compile ;;
  *" -shared "*) stage=link ;;
  *) exec {cxx} "$@" ;;
esac
cpus=$(sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' /proc/self/status)
echo "$stage $cpus preload=$LD_PRELOAD omp=$OMP_NUM_THREADS" >> {log}
if [ "$FI_TEST_BLOCK" = "$stage" ]; then : > "$FI_TEST_MARKER"; sleep 4; fi
exec {cxx} "$@"
"""


class CountingCompiler:
    """A g++ that records each compile and link, and can be told to hang in one of them."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "counting-g++"
        self._log = directory / "compiler.log"
        cxx = shutil.which("g++")
        self.path.write_text(_COMPILER.format(cxx=cxx, log=self._log))
        self.path.chmod(0o755)

    def lines(self, stage: str) -> list[str]:
        """Return what each command of a stage saw: its cores and environment."""
        text = self._log.read_text() if self._log.exists() else ""
        return [line for line in text.splitlines() if line.startswith(stage)]
