from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from counting_compiler import CountingCompiler

from fi_backend import env
from fi_backend.errors import MissingModuleError
from fi_backend.jit import KernelSpec, aot, entry, isa, load, loader, store
from fi_backend.jit.request import resolve

Make = Callable[..., KernelSpec]

_NO_JIT = {"PATH": "", "FI_BACKEND_CXX": "/no/such/compiler", "FI_BACKEND_DISABLE_JIT": "1"}
_LOAD = "assert load(spec(2)).value() == 42\n"
_MISS = (
    "from fi_backend.errors import MissingModuleError\n"
    "try: load(spec(3))\n"
    "except MissingModuleError as error: assert 'value_3' in str(error)\n"
    "else: raise SystemExit('nothing was missing')\n"
)


def test_directory_serves_with_the_jit_disabled(
    spec: Make, compiler: CountingCompiler, output: Callable[..., str], tmp_path: Path
) -> None:
    entries = aot.build_directory([spec(2)], tmp_path / "aot")
    assert [path.parent.parent for path in entries] == [tmp_path / "aot"]
    unused = tmp_path / "unused"
    output(
        _LOAD + _MISS,
        **_NO_JIT,
        FI_BACKEND_AOT_DIR=str(tmp_path / "aot"),
        FI_BACKEND_CACHE_DIR=str(unused),
    )
    assert not unused.exists()


def test_building_twice_replaces(spec: Make, compiler: CountingCompiler, tmp_path: Path) -> None:
    first = aot.build_directory([spec(2)], tmp_path / "aot")
    assert aot.build_directory([spec(2)], tmp_path / "aot") == first
    assert len(compiler.lines("compile")) == 1
    assert [path.name for path in (tmp_path / "aot").iterdir()] == [resolve(spec(2)).family]


@pytest.mark.skipif(isa.host_level() == "generic", reason="needs a CPU level above generic")
def test_best_level_that_runs_here_wins(
    spec: Make, compiler: CountingCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aot.build_directory([spec(2)], tmp_path / "aot", levels=isa.LEVELS)
    monkeypatch.setenv(env.AOT_DIR.name, str(tmp_path / "aot"))
    for level in (isa.host_level(), "generic"):
        monkeypatch.setenv(env.CPU_ISA.name, level)
        found = store.find(resolve(spec(2)))
        assert found is not None
        assert tmp_path / "aot" in found.parents
        assert entry.read_manifest(found).level == level


def test_other_flags_are_not_served_by_a_prebuilt_module(
    spec: Make, compiler: CountingCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aot.build_directory([spec(2)], tmp_path / "aot")
    monkeypatch.setenv(env.AOT_DIR.name, str(tmp_path / "aot"))
    monkeypatch.setenv(env.DISABLE_JIT.name, "1")
    monkeypatch.setattr(loader, "_modules", {})
    monkeypatch.setenv(env.JIT_DEBUG.name, "1")
    with pytest.raises(MissingModuleError, match="value_2"):
        load(spec(2))


def test_wheel_installs_and_serves(
    spec: Make, compiler: CountingCompiler, output: Callable[..., str], tmp_path: Path
) -> None:
    wheel = aot.build_wheel([spec(2)], tmp_path / "dist")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q"]
    subprocess.run([*install, "--target", site, wheel], check=True)
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    unused = str(tmp_path / "unused")
    output(_LOAD + _MISS, **_NO_JIT, PYTHONPATH=path, FI_BACKEND_CACHE_DIR=unused)
    metadata = next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert "Requires-Dist: apache-tvm-ffi==" in text


def test_same_modules_give_the_same_wheel(
    spec: Make, compiler: CountingCompiler, tmp_path: Path
) -> None:
    first = aot.build_wheel([spec(2)], tmp_path / "1").read_bytes()
    assert aot.build_wheel([spec(2)], tmp_path / "2").read_bytes() == first
