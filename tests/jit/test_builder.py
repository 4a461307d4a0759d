from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from counting_compiler import CountingCompiler

from fi_backend import env
from fi_backend.errors import BuildError, CacheLockTimeout, MissingModuleError, ToolchainError
from fi_backend.jit import KernelSpec, affinity, build, store
from fi_backend.jit.lock import BuildLock
from fi_backend.jit.request import resolve

Make = Callable[..., KernelSpec]
Start = Callable[..., "subprocess.Popen[str]"]


def test_builds_once_and_reports(spec: Make, compiler: CountingCompiler) -> None:
    specs = [spec(1), spec(2), spec(1)]
    updates: list[tuple[int, int, str]] = []
    first = build(specs, progress=lambda *update: updates.append(update))
    assert (first.built, first.reused) == (("value_1", "value_2"), ())
    again = build(specs)
    assert (again.built, again.reused) == ((), ("value_1", "value_2"))
    assert len(compiler.lines("compile")) == len(compiler.lines("link")) == 2
    assert [done for done, _, _ in updates] == [1, 2, 3, 4]
    assert {total for _, total, _ in updates} == {4}
    assert not list((store.write_root() / "tmp").iterdir())


def test_entry_keeps_sources_and_no_objects(spec: Make, compiler: CountingCompiler) -> None:
    build([spec()])
    entry = store.find(resolve(spec()))
    assert entry is not None
    assert sorted(os.listdir(entry)) == ["manifest.json", "module.so", "value.cc"]
    assert (store.write_root().stat().st_mode & 0o777) == 0o700


def test_eight_processes_compile_once(start: Start, compiler: CountingCompiler) -> None:
    processes = [start("print(len(build([spec(2)]).built))") for _ in range(8)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    assert len(compiler.lines("compile")) == len(compiler.lines("link")) == 1


_HANG = """
import os, sys, time
from fi_backend.jit import entry, store
def hang(*args, **kwargs):
    open(os.environ["FI_TEST_MARKER"], "w").close()
    time.sleep(60)
{patch} = hang
build([spec(2)])
"""


@pytest.mark.parametrize(
    "moment", ["compile", "link", "entry.write_manifest", "store.publish", "store.os.rename"]
)
def test_killed_builder_leaves_a_usable_cache(
    start: Start, spec: Make, compiler: CountingCompiler, tmp_path: Path, moment: str
) -> None:
    marker = tmp_path / "reached"
    in_python = moment not in ("compile", "link")
    code = _HANG.format(patch=moment) if in_python else "build([spec(2)])"
    block = "" if in_python else moment
    process = start(code, FI_TEST_BLOCK=block, FI_TEST_MARKER=str(marker))
    deadline = time.monotonic() + 60
    while not marker.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.communicate()
    assert store.find(resolve(spec(2))) is None
    assert build([spec(2)]).built == ("value_2",)
    assert store.find(resolve(spec(2))) is not None
    assert build([spec(2)]).reused == ("value_2",)
    assert not list((store.write_root() / "tmp").glob("value_2*"))


def test_failing_compile_shows_command_and_tail_and_spares_the_others(
    spec: Make, tree: Path, compiler: CountingCompiler
) -> None:
    bad = (tree / "templates" / "value.cc.j2").read_text() + "#error out of cheese\n"
    (tree / "templates" / "bad.cc.j2").write_text(bad)
    broken = spec(3, name="broken", templates=("bad.cc.j2",))
    with pytest.raises(BuildError) as caught:
        build([spec(1), broken, spec(2)])
    error = caught.value
    assert error.modules == ("broken",)
    assert str(compiler.path) in error.command
    assert "-c" in error.command.split()
    message = str(error)
    assert "compiling broken failed" in message
    assert error.command in message
    assert "out of cheese" in message
    assert env.CXX.name in message
    assert build([spec(1), spec(2)]).reused == ("value_1", "value_2")
    sources = [word for word in error.command.split() if word.endswith("bad.cc")]
    assert Path(sources[0]).is_file()  # the command can be run again by hand


def test_header_edited_during_the_compile_is_not_published(
    spec: Make, tree: Path, compiler: CountingCompiler
) -> None:
    before = resolve(spec())

    def edit(done: int, total: int, what: str) -> None:
        (tree / "include" / "tiny" / "base.h").write_text(f"#define FI_TINY_BASE 5{done}\n")

    with pytest.raises(BuildError, match="value_2 changed while it was compiled; run again"):
        build([spec()], progress=edit)
    assert store.find(before) is None
    assert build([spec()]).built == ("value_2",)


def test_failing_link_is_not_published(spec: Make, compiler: CountingCompiler) -> None:
    broken = spec(2, extra_ldflags=("-lno_such_library",))
    with pytest.raises(BuildError, match="no_such_library"):
        build([broken])
    assert store.find(resolve(broken)) is None


def test_undefined_symbol_fails_the_build(
    spec: Make, tree: Path, compiler: CountingCompiler
) -> None:
    with (tree / "include" / "tiny" / "value.h").open("a") as header:
        header.write('extern "C" int nobody_defines_this();\nint use() { return ')
        header.write("nobody_defines_this(); }\n")
    with pytest.raises(BuildError, match="nobody_defines_this"):
        build([spec()])


def test_missing_compiler(spec: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.CXX.name, "/no/such/g++")
    with pytest.raises(ToolchainError, match="/no/such/g\\+\\+ is not on PATH; install"):
        build([spec()])


def test_lock_held_too_long(
    spec: Make, compiler: CountingCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.LOCK_TIMEOUT.name, "0.2")
    lock = BuildLock(store.lock_path(resolve(spec())))
    assert lock.try_acquire()
    with pytest.raises(CacheLockTimeout) as caught:
        build([spec()])
    assert f"process {os.getpid()}" in str(caught.value)
    assert env.LOCK_TIMEOUT.name in str(caught.value)
    lock.release()
    assert build([spec()]).built == ("value_2",)


def test_builders_leave_each_other_alone_where_nothing_can_be_locked(
    spec: Make, compiler: CountingCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    live, dead = (store.new_build_dir(resolve(spec()), is_only_builder=False) for _ in range(2))
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(dead, (two_days_ago, two_days_ago))
    assert build([spec()]).built == ("value_2",)
    assert live.exists()
    assert not dead.exists()


def test_what_is_free_is_built_while_another_builder_holds_the_rest(
    spec: Make, compiler: CountingCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.LOCK_TIMEOUT.name, "0.2")
    lock = BuildLock(store.lock_path(resolve(spec(1))))
    assert lock.try_acquire()
    with pytest.raises(CacheLockTimeout):
        build([spec(1), spec(2)])
    lock.release()
    assert store.find(resolve(spec(2))) is not None


def test_finished_module_is_free_while_the_rest_compiles(
    spec: Make, compiler: CountingCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.MAX_JOBS.name, "1")
    requests = {request.family: request for request in map(resolve, (spec(1), spec(2)))}
    early = []

    def look(done: int, total: int, what: str) -> None:
        for family, request in requests.items():
            if what != f"LINK {family}" and store.find(request) is not None:
                lock = BuildLock(store.lock_path(request))
                early.append(lock.try_acquire())
                lock.release()

    build([spec(1), spec(2)], progress=look)
    assert early
    assert all(early)


def test_disabled_jit_compiles_nothing(
    spec: Make, compiler: CountingCompiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(env.DISABLE_JIT.name, "1")
    with pytest.raises(MissingModuleError, match=f"value_2.*{env.AOT_DIR.name}"):
        build([spec()])
    assert not (tmp_path / "cache").exists()
    monkeypatch.delenv(env.DISABLE_JIT.name)
    build([spec()])
    monkeypatch.setenv(env.DISABLE_JIT.name, "1")
    assert build([spec()]).reused == ("value_2",)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores to pin to one of them")
def test_pinned_worker_builds_on_every_core(
    output: Callable[..., str], compiler: CountingCompiler
) -> None:
    before = sorted(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, {{{before[0]}}}); build([spec(2)]); "
        "print(sorted(os.sched_getaffinity(0)))"
    )
    assert output(code, OMP_NUM_THREADS="1").strip() == str([before[0]])
    stage, cores, preload, omp = compiler.lines("compile")[0].split()
    assert cores != str(before[0])
    assert (stage, preload, omp) == ("compile", "preload=", "omp=")


def test_affinity_is_given_back() -> None:
    before = os.sched_getaffinity(0)
    with affinity.every_allowed_core():
        assert before <= os.sched_getaffinity(0)
    assert os.sched_getaffinity(0) == before


def test_verbose_prints_the_commands(
    spec: Make,
    compiler: CountingCompiler,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(env.JIT_VERBOSE.name, "1")
    build([spec()])
    printed = capsys.readouterr().err
    assert f"{compiler.path} " in printed
    assert "-std=c++17" in printed


def test_importing_and_building_need_no_torch(output: Callable[..., str]) -> None:
    code = (
        "import sys; heavy = {'torch', 'tvm_ffi', 'jinja2'}; assert not heavy & set(sys.modules)\n"
        "build([spec(2)]); assert not {'torch', 'tvm_ffi'} & set(sys.modules)"
    )
    assert output(code) == ""
