from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from counting_compiler import CountingCompiler

from fi_backend.errors import ModuleLoadError
from fi_backend.jit import KernelSpec, build, load, loader, store
from fi_backend.jit.request import resolve

Make = Callable[..., KernelSpec]

_WARM = """
import sys, time
started = []
def watch(event, args):
    if event in ("subprocess.Popen", "os.system", "os.fork", "os.forkpty") or event.startswith(
        ("os.exec", "os.posix_spawn", "os.spawn")
    ):
        started.append((event, args))
import tvm_ffi
sys.addaudithook(watch)
seconds = []
for number in (1, 2, 3):
    begin = time.perf_counter()
    module = load(spec(number))
    seconds.append(time.perf_counter() - begin)
    assert module.value() == 40 + number
assert not started, started
assert "jinja2" not in sys.modules
print(min(seconds))
"""


@pytest.fixture(autouse=True)
def _no_memo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_modules", {})


def test_cold_then_warm(spec: Make, compiler: CountingCompiler) -> None:
    module = load(spec(2))
    assert module.value() == 42
    assert load(spec(2)) is module
    loader._modules.clear()
    assert load(spec(2)).value() == 42
    assert len(compiler.lines("compile")) == 1


def test_warm_load_is_quick_and_starts_nothing(
    spec: Make, compiler: CountingCompiler, output: Callable[..., str]
) -> None:
    build([spec(number) for number in (1, 2, 3)])
    assert float(output(_WARM)) < 0.020


def test_warm_load_needs_no_programs(
    spec: Make, compiler: CountingCompiler, output: Callable[..., str]
) -> None:
    build([spec(number) for number in (1, 2, 3)])
    output(_WARM, PATH="", FI_BACKEND_CXX="/no/such/compiler")


def test_threads_share_one_build(spec: Make, compiler: CountingCompiler) -> None:
    modules: list = []
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        modules.append(load(spec(2)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(modules) == 4
    assert all(module is modules[0] for module in modules)
    assert len(compiler.lines("compile")) == 1


def _replace_library(spec: KernelSpec) -> Path:
    """Make the entry one that passes every check of ours and that the dynamic loader refuses."""
    import hashlib

    directory = store.find(resolve(spec))
    assert directory is not None
    data = b"\x7fELF and nothing else"
    (directory / "module.so").write_bytes(data)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    assert store.find(resolve(spec)) == directory
    return directory


def test_library_that_does_not_load_is_built_again(
    spec: Make, compiler: CountingCompiler, caplog: pytest.LogCaptureFixture
) -> None:
    build([spec()])
    directory = _replace_library(spec())
    assert load(spec()).value() == 42
    assert f"{directory}/module.so does not load" in caplog.text
    assert "building it again" in caplog.text
    assert len(compiler.lines("compile")) == 2


def test_library_that_never_loads_says_so(
    spec: Make, tree: Path, compiler: CountingCompiler
) -> None:
    # The linker accepts a missing symbol when told to; the dynamic loader does not.
    with (tree / "include" / "tiny" / "value.h").open("a") as header:
        header.write("extern int nobody_has_this;\n")
        header.write("__attribute__((used)) inline int* const kAddress = &nobody_has_this;\n")
        header.write("static int* volatile g_use = kAddress;\n")
    with pytest.raises(ModuleLoadError, match=r"nobody_has_this.*clear-cache"):
        load(spec(extra_ldflags=("-Wl,-z,undefs",)))


def test_fork_does_not_inherit_a_held_lock() -> None:
    loader._locks["held elsewhere"] = threading.Lock()
    loader._after_fork()
    assert not loader._locks
