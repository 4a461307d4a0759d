"""The wheel carries everything a kernel needs, on a machine that never saw the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from fi_backend.integrations.sglang import registration as sglang
from fi_backend.integrations.vllm import registration as vllm

ROOT = Path(__file__).parent.parent

RUN_A_KERNEL = """
import pathlib, sys, torch, fi_backend
assert pathlib.Path(fi_backend.__file__).is_relative_to(sys.prefix), fi_backend.__file__
x = torch.randn(4, 64)
out = fi_backend.rmsnorm(x, torch.ones(64))
torch.testing.assert_close(out, torch.nn.functional.rms_norm(x, (64,), eps=1e-6))
print("ran")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", reason="building a wheel needs setuptools")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fi_backend", source / "fi_backend", ignore=ignore)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(out), str(source)], check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_carries_every_kernel_source(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "fi_backend/csrc").rglob("*")
        if path.is_file()
    }
    assert sources
    assert sources <= inside
    assert "fi_backend/py.typed" in inside
    entry_points = next(name for name in inside if name.endswith("entry_points.txt"))
    text = zipfile.ZipFile(wheel).read(entry_points).decode()
    assert "fi_backend.integrations.vllm:register" in text
    assert "fi-backend = fi_backend.cli:main" in text


def test_extras_name_the_tested_engines(wheel: Path) -> None:
    """A newer engine, which the plugins leave alone, is not what an extra should install."""
    inside = zipfile.ZipFile(wheel)
    metadata = next(name for name in inside.namelist() if name.endswith("METADATA"))
    lines = inside.read(metadata).decode().splitlines()
    for bounds in (
        f'vllm<{_after(vllm._NEWEST_TESTED)},>=0.25.1; extra == "vllm"',
        f'sglang<{_after(sglang._NEWEST_TESTED)},>=0.5.17; extra == "sglang"',
    ):
        assert f"Requires-Dist: {bounds}" in lines


def _after(version: tuple[int, ...]) -> str:
    return ".".join(map(str, (*version[:-1], version[-1] + 1)))


def test_kernel_runs_from_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    """A fresh environment sees our wheel and, through a path file, only our dependencies."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = home / "lib" / version / "site-packages"
    zipfile.ZipFile(wheel).extractall(site)
    # A path file is not followed into other path files: the checkout itself stays invisible.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("FI_BACKEND_", "PYTHON"))
    }
    environment["FI_BACKEND_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run(
        [home / "bin/python", "-c", RUN_A_KERNEL],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ran\n"
