from __future__ import annotations

import io
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from fi_backend import cli, env
from fi_backend.jit import KernelSpec, build, store

TEMPLATE = """\
// Returns a constant.
#include <tvm/ffi/c_api.h>
extern "C" __attribute__((visibility("default"))) int __tvm_ffi_value(void*, const TVMFFIAny*,
                                                                      int32_t, TVMFFIAny* result) {
  result->type_index = kTVMFFIInt;
  result->zero_padding = 0;
  result->v_int64 = {{ number }};
  return 0;
}
"""
Run = Callable[..., "tuple[int, str]"]


@pytest.fixture
def specs(tmp_path: Path) -> list[KernelSpec]:
    (tmp_path / "tree" / "templates").mkdir(parents=True)
    (tmp_path / "tree" / "templates" / "value.cc.j2").write_text(TEMPLATE)
    root = str(tmp_path / "tree")
    return [
        KernelSpec(f"value_{n}", "cpu", ("value.cc.j2",), (("number", n),), root=root)
        for n in (1, 2)
    ]


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, specs: list[KernelSpec]) -> None:
    for variable in env.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.setenv(env.CACHE_DIR.name, str(tmp_path / "cache"))
    monkeypatch.setattr(store, "_chosen", {})
    monkeypatch.setattr(store, "_fallback_base", lambda: tmp_path / "no fallback")


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch, specs: list[KernelSpec]) -> list[dict]:
    """Replace the model -> specs table; returns the configs it was asked for."""
    asked: list[dict] = []

    def specs_for_model(config: dict, device_type: str) -> list[KernelSpec]:
        asked.append(config if device_type == "cpu" else {**config, "device": device_type})
        return specs

    module = types.ModuleType("fi_backend.warmup")
    module.specs_for_model = specs_for_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fi_backend.warmup", module)
    monkeypatch.setattr("fi_backend.warmup", module, raising=False)
    return asked


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str]:
        status = cli.main(arguments)
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return call


def test_show_config(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_BACKEND_MAX_JOBS", "3")
    monkeypatch.setenv("FI_BACKEND_CASHE_DIR", "/x")
    monkeypatch.setenv("FI_BACKEND_LOGLEVEL", "loud")
    status, text = run("show-config")
    assert status == 0
    for variable in env.VARIABLES:
        assert variable.name in text
    assert "misspelt? FI_BACKEND_CASHE_DIR" in text
    assert "ERROR: FI_BACKEND_LOGLEVEL='loud'" in text
    assert "not made yet" in text
    assert not Path(env.CACHE_DIR.get() or "").exists()


def test_list_modules(run: Run) -> None:
    status, text = run("list-modules")
    assert status == 0
    lines = text.splitlines()
    assert lines[0].split()[:2] == ["module", "target"]
    first = lines[1].split()[0]
    assert run("list-modules", first)[1].splitlines()[1].split() == lines[1].split()
    assert len(run("list-modules", "no such kernel")[1].splitlines()) == 1


def test_warmup_then_status(run: Run, configs: list[dict]) -> None:
    dims = ["--num-qo-heads", "32", "--num-kv-heads", "8", "--head-dim", "128"]
    _, missing = run("module-status", *dims)
    assert missing.count("missing") == 2
    status, text = run("warmup", *dims, "--dtype", "bfloat16")
    assert status == 0
    assert "compiled 2 modules" in text
    assert configs[-1] == {
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "torch_dtype": "bfloat16",
    }
    assert "0 modules in" in run("warmup", *dims)[1]
    assert "2 modules, 2 ready" in run("module-status", *dims)[1]
    assert "2 modules, 2 ready" in run("module-status")[1]
    _, detailed = run("module-status", "--detailed", "--filter", "value_2")
    assert "parameters: number=2" in detailed
    assert "1 modules, 1 ready" in detailed


def test_warmup_reads_a_config_file_and_options_win(
    run: Run, configs: list[dict], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"head_dim": 64, "hidden_size": 256}))
    for model in (tmp_path, tmp_path / "config.json"):
        assert run("warmup", "--model", str(model), "--head-dim", "128")[0] == 0
        assert configs[-1] == {"head_dim": 128, "hidden_size": 256}
    assert run("warmup", "--head-dim", "64", "--device", "cuda")[0] == 0
    assert configs[-1] == {"head_dim": 64, "device": "cuda"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["warmup"], "pass --model CONFIG, or dims"),
        (["warmup", "--model", "/no/such/config.json"], "/no/such/config.json"),
        (["aot", "--out-dir", "/x"], "the cache is empty"),
        (["aot", "--out-dir", "/x", "--isa", "avx1024"], "must be one of avx512_bf16"),
    ],
)
def test_mistakes_are_one_line_and_status_1(run: Run, arguments: list[str], message: str) -> None:
    status, text = run(*arguments)
    assert status == 1
    assert text.startswith("fi-backend: error: ")
    assert message in text
    assert len(text.splitlines()) == 1


def test_clear_cache_asks(
    run: Run, specs: list[KernelSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(specs)
    neighbour = tmp_path / "cache" / "not ours"
    neighbour.write_text("keep")
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    assert run("clear-cache")[0] == 1
    assert store.read_roots()
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert run("clear-cache")[0] == 0
    assert store.read_roots() == []
    assert neighbour.exists()
    build(specs)
    assert run("clear-cache", "--yes")[0] == 0
    assert "there is no kernel cache" in run("clear-cache", "--yes")[1]


def test_aot_from_the_cache(run: Run, specs: list[KernelSpec], tmp_path: Path) -> None:
    build(specs)
    status, text = run("aot", "--out-dir", str(tmp_path / "aot"))
    assert status == 0
    assert "2 modules in" in text
    status, text = run("aot", "--wheel", str(tmp_path / "dist"))
    assert status == 0
    assert [path.suffix for path in (tmp_path / "dist").iterdir()] == [".whl"]


def test_compile_commands(run: Run, configs: list[dict], tmp_path: Path) -> None:
    output = tmp_path / "cc.json"
    status, text = run("compile-commands", "--output", str(output), "--head-dim", "64")
    assert status == 0
    assert "2 translation units" in text
    assert len(json.loads(output.read_text())) == 2
