from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fi_backend import env
from fi_backend.jit import KernelSpec, arch, isa, key, paths, toolchain
from fi_backend.jit.request import resolve

Make = Callable[..., KernelSpec]


def place(spec: KernelSpec) -> tuple[str, str]:
    request = resolve(spec)
    return request.family, request.entry


@pytest.fixture
def before(spec: Make) -> tuple[str, str]:
    return place(spec())


def test_same_content_same_key_wherever_it_lies(
    spec: Make, tree: Path, tmp_path: Path, before: tuple[str, str]
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(tree, moved)
    assert place(spec(root=str(moved))) == before
    for path in tree.rglob("*.h"):
        os.utime(path, (1, 1))
    assert place(spec()) == before


@pytest.mark.parametrize(
    "file", ["templates/value.cc.j2", "include/tiny/value.h", "include/tiny/base.h"]
)
def test_edit_changes_the_key(spec: Make, tree: Path, before: tuple[str, str], file: str) -> None:
    with (tree / file).open("a") as source:
        source.write("// edited\n")
    assert place(spec())[0] != before[0]


def test_unreached_header_does_not(spec: Make, tree: Path, before: tuple[str, str]) -> None:
    (tree / "include" / "tiny" / "other.h").write_text("// nobody includes this\n")
    assert place(spec()) == before


def test_header_that_appears_earlier_in_the_search_changes_the_key(
    spec: Make, tree: Path, before: tuple[str, str]
) -> None:
    (tree / "tiny").mkdir()
    (tree / "tiny" / "value.h").write_text("#define FI_TINY_BASE 1\n")
    assert place(spec())[0] != before[0]


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": (("number", 3),)},
        {"parameters": (("number", 2.0),)},
        {"parameters": (("number", "2"),)},
        {"extra_cflags": ("-DX",)},
        {"extra_ldflags": ("-lm",)},
        {"name": "other"},
    ],
)
def test_spec_change_changes_the_key(spec: Make, before: tuple[str, str], change: dict) -> None:
    assert place(spec(**change)) != before


def test_renderer_and_tvm_ffi_change_the_key(
    spec: Make, before: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(paths, "tvm_ffi_version", lambda: "0.1.99")
        assert place(spec())[0] != before[0]
    monkeypatch.setattr(key, "_renderer", lambda: "another way to render")
    assert place(spec())[0] != before[0]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        (env.EXTRA_CFLAGS, "-DX"),
        (env.EXTRA_LDFLAGS, "-lm"),
        (env.JIT_DEBUG, "1"),
        (env.JIT_LINEINFO, "1"),
        (env.CPU_ISA, "generic"),
    ],
)
def test_flag_or_isa_changes_the_variant(
    spec: Make,
    before: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    variable: env.Variable,
    value: str,
) -> None:
    if variable is env.CPU_ISA and isa.host_level() == "generic":
        pytest.skip("this machine has no better level than generic")
    monkeypatch.setenv(variable.name, value)
    family, entry = place(spec())
    assert family == before[0]
    assert entry.partition("-")[0] != before[1].partition("-")[0]


def test_compiler_changes_the_entry_alone(
    spec: Make, before: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "g++"
    shutil.copy(str(shutil.which("g++")), other)
    monkeypatch.setenv(env.CXX.name, str(other))
    family, entry = place(spec())
    assert family == before[0]
    assert entry.partition("-")[0] == before[1].partition("-")[0]
    assert entry != before[1]
    os.utime(other, (1, 1))  # replaced by another build of the same size
    assert place(spec())[1] != entry


def test_resolving_runs_nothing(spec: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.subprocess, "Popen", None)
    assert place(spec())


def test_cuda_archs_change_the_variant(spec: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.CUDA_ARCH_LIST.name, "9.0")
    hopper = resolve(spec(target="cuda"))
    monkeypatch.setenv(env.CUDA_ARCH_LIST.name, "compute_80")
    portable = resolve(spec(target="cuda"))
    assert hopper.archs == (arch.parse_token("9.0a"),)
    assert hopper.family == portable.family
    assert hopper.variant != portable.variant
    assert hopper.flags_key == portable.flags_key


@pytest.mark.parametrize("line", ["#include HEADER", "# include <{{ number }}.h>"])
def test_include_that_cannot_be_followed_raises(spec: Make, tree: Path, line: str) -> None:
    with (tree / "templates" / "value.cc.j2").open("a") as source:
        source.write(line + "\n")
    with pytest.raises(ValueError, match=r"value\.cc\.j2: cannot follow #include"):
        resolve(spec())


def test_closure_follows_every_spelling(tmp_path: Path) -> None:
    (tmp_path / "a.h").write_text(' #  include "b.h" // why\n/* */\n#include<c.h>\r\n')
    (tmp_path / "b.h").write_text("#if 0\n#include <d.h>\n#endif\n#include <a.h>\n")
    for name in ("c.h", "d.h", "e.h"):
        (tmp_path / name).write_text("// #include <e.h>\n")
    found = key.closure([str(tmp_path / "a.h")], (tmp_path,))
    assert sorted(os.path.basename(path) for path in found) == ["a.h", "b.h", "c.h", "d.h"]
