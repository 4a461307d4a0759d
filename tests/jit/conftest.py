"""A tiny kernel tree of its own, a private cache, and a compiler that counts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from counting_compiler import CountingCompiler

from fi_backend import env
from fi_backend.jit import KernelSpec, store

# The C header alone compiles in a fraction of the time of tvm-ffi's C++ headers.
VALUE_TEMPLATE = """\
// Returns a constant.
#include <tvm/ffi/c_api.h>

#include <tiny/value.h>

extern "C" __attribute__((visibility("default"))) int __tvm_ffi_value(void*, const TVMFFIAny*,
                                                                      int32_t, TVMFFIAny* result) {
  result->type_index = kTVMFFIInt;
  result->zero_padding = 0;
  result->v_int64 = kBase + {{ number | cpp }};
  return 0;
}
"""
VALUE_HEADER = '#pragma once\n#include "base.h"\ninline constexpr long long kBase = FI_TINY_BASE;\n'
BASE_HEADER = "#pragma once\n#define FI_TINY_BASE 40\n"


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every test its own cache and no configuration of the developer's."""
    for variable in env.VARIABLES:
        for name in (variable.name, *variable.aliases):
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path / "cache"))
    scratch = tmp_path / "tmpdir"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", None)  # what it remembers of the real one
    monkeypatch.setattr(store, "_chosen", {})
    monkeypatch.setattr(store, "_said", set())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A root with one template and two headers, one reached through the other."""
    root = tmp_path / "tree"
    (root / "templates").mkdir(parents=True)
    (root / "include" / "tiny").mkdir(parents=True)
    (root / "templates" / "value.cc.j2").write_text(VALUE_TEMPLATE)
    (root / "include" / "tiny" / "value.h").write_text(VALUE_HEADER)
    (root / "include" / "tiny" / "base.h").write_text(BASE_HEADER)
    return root


@pytest.fixture
def spec(tree: Path) -> Callable[..., KernelSpec]:
    """Make a spec of the tiny kernel; its module's ``value()`` returns 40 + number."""

    def make(number: int = 2, **fields: object) -> KernelSpec:
        values: dict = {
            "name": f"value_{number}",
            "target": "cpu",
            "templates": ("value.cc.j2",),
            "parameters": (("number", number),),
            "root": str(tree),
            **fields,
        }
        return KernelSpec(**values)

    return make


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CountingCompiler:
    """Make the counting compiler the one in use."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    made = CountingCompiler(tmp_path)
    monkeypatch.setenv(env.CXX.name, str(made.path))
    return made


@pytest.fixture
def start(tree: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start a Python process that has ``spec(number)`` defined and runs the given code."""
    prelude = (
        "from fi_backend.jit import KernelSpec, build, load\n"
        "def spec(number):\n"
        "    return KernelSpec(f'value_{number}', 'cpu', ('value.cc.j2',),\n"
        f"                      (('number', number),), root={str(tree)!r})\n"
    )

    def run(code: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", prelude + code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **variables},
        )

    return run


@pytest.fixture
def output(start: Callable[..., subprocess.Popen[str]]) -> Callable[..., str]:
    """Run code as ``start`` does, require success, and return what it printed."""

    def run(code: str, **variables: str) -> str:
        out, err = start(code, **variables).communicate(timeout=120)
        assert out.endswith("done\n"), err
        return out.removesuffix("done\n")

    return lambda code, **variables: run(f"{code}\nprint('done')", **variables)
