"""A wheel of prebuilt modules serves a machine that has no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fi_backend import cli, prebuilt

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "tests" / "prebuilt_program.py"


def run_without_compiler(
    device: str, dtype: str, site: Path | None, cache: Path
) -> subprocess.CompletedProcess[str]:
    """Run the program with nothing on PATH and no cache; `site` is where a wheel is installed."""
    dropped = ("FI_BACKEND_", "CUDA_HOME", "CUDA_PATH", "CXX")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    searched = (site, ROOT, environment.get("PYTHONPATH"))
    environment |= {
        "PATH": "",
        "PYTHONPATH": os.pathsep.join(str(path) for path in searched if path),
        "FI_BACKEND_CACHE_DIR": str(cache),
    }
    return subprocess.run(
        [sys.executable, PROGRAM, device, dtype, "64"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", "float32"), pytest.param("cuda", "bfloat16", marks=pytest.mark.gpu)],
)
def test_public_calls_without_a_compiler(device: str, dtype: str, tmp_path: Path) -> None:
    options = ["--head-dim", "64", "--dtype", dtype, "--device", device]
    assert cli.main(["aot", "--wheel", str(tmp_path / "dist"), *options]) == 0
    (wheel,) = (tmp_path / "dist").iterdir()
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q"]
    subprocess.run([*install, "--target", tmp_path / "site", wheel], check=True)

    done = run_without_compiler(device, dtype, tmp_path / "site", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    loaded, _, said = done.stdout.strip().partition(" ")
    assert said == "modules, no program started"
    inside = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("module.so")]
    assert 8 <= int(loaded) <= len(inside)
    assert not (tmp_path / "cache").exists()

    alone = run_without_compiler(device, dtype, None, tmp_path / "cache")
    assert alone.returncode != 0
    assert "ToolchainError" in alone.stderr


def test_a_package_combines_its_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built: list[str] = []
    used: list[list[str]] = []

    def build_directory(specs: list, out_dir: Path, *, levels: list[str]) -> list[Path]:
        built.extend(spec.name for spec in specs)
        used.append(levels)
        return []

    monkeypatch.setattr("fi_backend.jit.aot.build_directory", build_directory)
    monkeypatch.setenv("FI_BACKEND_CUDA_ARCH_LIST", "")
    options = "--device cpu cuda --head-dim 64 128 --dtype bfloat16 float16 --kv-cache-dtype auto "
    options += "fp8_e4m3 --isa avx2 --isa generic --cuda-arch-list 9.0a"
    assert cli.main(["aot", "--out-dir", str(tmp_path), *options.split()]) == 0
    assert os.environ["FI_BACKEND_CUDA_ARCH_LIST"] == "9.0a"
    assert len(set(built)) == len(built)
    decodes = [name for name in built if name.startswith("decode")]
    assert len(decodes) == 2 * 2 * 2 * 2
    expected = set()
    for device in ("cpu", "cuda"):
        for dtype in ("bfloat16", "float16"):
            config = {"head_dim": 64, "torch_dtype": dtype}
            expected |= {spec.name for spec in prebuilt.package_specs(config, device)}
    assert expected <= set(built)
    # What runs on the CPU beside a GPU runs on every CPU.
    assert (
        cli.main(["aot", "--out-dir", str(tmp_path), "--device", "cuda", "--head-dim", "64"]) == 0
    )
    assert used == [["avx2", "generic"], ["generic"]]


def test_a_package_holds_what_only_some_callers_reach() -> None:
    config = {"head_dim": 64, "torch_dtype": "bfloat16"}
    for device in ("cpu", "cuda"):
        names = {spec.name for spec in prebuilt.package_specs(config, device)}
        assert {"packbits_cpu", "plan_cpu"} <= names
        assert sum("norm" in name and "i8" in name for name in names) == 1 + (device == "cuda")
    with pytest.raises(ValueError, match="q_dtype"):
        prebuilt.package_specs({"head_dim": 64, "torch_dtype": "float32"}, "cuda")
