from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

from fi_backend import env
from fi_backend.errors import ToolchainError
from fi_backend.jit import affinity, toolchain


def program(path: Path, body: str = "exit 0") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def empty_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with one empty directory, and no CUDA variables."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    return directory


def test_cxx_order(empty_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert toolchain.find_cxx() is None
    plain = program(empty_path / "c++")
    assert toolchain.find_cxx() == (str(plain),)
    gnu = program(empty_path / "g++")
    assert toolchain.find_cxx() == (str(gnu),)
    launcher = program(tmp_path / "ccache")
    monkeypatch.setenv("CXX", f"{launcher} g++")
    assert toolchain.find_cxx() == (str(launcher), str(gnu))
    monkeypatch.setenv(env.CXX.name, str(plain))
    assert toolchain.find_cxx() == (str(plain),)


def test_flags_of_the_compiler_are_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = toolchain.drivers("cpu")
    assert plain is not None
    monkeypatch.setenv("CXX", "g++ -O0 -DX=1")
    assert toolchain.drivers("cpu") == (*plain, "-O0", "-DX=1")


def test_nvcc_order(empty_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert toolchain.find_nvcc() is None
    wheel = program(tmp_path / "site" / "nvidia" / "cu13" / "bin" / "nvcc")
    assert toolchain.find_nvcc() == str(wheel)
    on_path = program(empty_path / "nvcc")
    assert toolchain.find_nvcc() == str(on_path)
    home = program(tmp_path / "home" / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "home"))
    assert toolchain.find_nvcc() == str(home)
    monkeypatch.setenv(env.NVCC.name, str(on_path))
    assert toolchain.find_nvcc() == str(on_path)
    monkeypatch.setenv(env.NVCC.name, str(tmp_path / "gone"))  # asked for: no silent other one
    assert toolchain.find_nvcc() is None


def test_missing_programs_say_what_to_do(
    empty_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ToolchainError, match=r"no C\+\+ compiler: .*apt-get install g\+\+"):
        toolchain.describe("cpu")
    assert toolchain.drivers("cpu") is None
    program(empty_path / "g++")
    with pytest.raises(ToolchainError, match="pip install ninja"):
        toolchain.describe("cpu")
    program(empty_path / "ninja")
    with pytest.raises(ToolchainError, match=r"no nvcc: .*fi-backend\[nvcc\]"):
        toolchain.describe("cuda")
    assert toolchain.drivers("cuda") is None
    program(empty_path / "g++", "exit 3")
    with pytest.raises(ToolchainError, match=f"does not run: .*{env.CXX.name}"):
        toolchain.describe("cpu")


def test_programs_behind_a_wrapper_are_stamped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = str(shutil.which("g++"))
    wrapper = program(tmp_path / "wrapped-g++", f'exec {real} "$@"')
    monkeypatch.setenv(env.CXX.name, str(wrapper))
    chain = toolchain.describe("cpu")
    assert chain.files[0] == toolchain.stamp(wrapper)
    assert any("cc1plus" in stamp for stamp in chain.files)
    assert chain.versions[0]


def test_children_lose_what_an_engine_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LD_PRELOAD", "OMP_NUM_THREADS", "KMP_AFFINITY"):
        monkeypatch.setenv(name, "1")
    environ = toolchain.child_environ()
    assert not {"LD_PRELOAD", "OMP_NUM_THREADS", "KMP_AFFINITY"} & set(environ)
    assert environ["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(
    ("text", "cores"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 1 << 30)]
)
def test_control_group_quota(tmp_path: Path, text: str, cores: int) -> None:
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert affinity._quota(tmp_path / "cpu.max") == cores


@pytest.mark.parametrize("name", ["MAX_JOBS", "FI_BACKEND_MAX_JOBS"])
def test_max_jobs_under_both_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "7")
    assert affinity.jobs() == 7
