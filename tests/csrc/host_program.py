"""Programs over headers that need no CUDA."""

from __future__ import annotations

import subprocess
from pathlib import Path

from fi_backend.jit import paths, toolchain


def output_of(text: str, directory: Path) -> str:
    """Compile and run a C++ program in `directory`; return what it prints."""
    cxx = toolchain.find_cxx()
    assert cxx is not None
    source, program = directory / "program.cc", directory / "program"
    source.write_text(text)
    flags = ["-std=c++17", "-O2", f"-I{paths.CSRC / 'include'}"]
    subprocess.run([*cxx, *flags, str(source), "-o", str(program)], check=True)
    return subprocess.run([program], capture_output=True, text=True, check=True).stdout
