from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from counting_compiler import CountingCompiler

from fi_backend import env
from fi_backend.jit import KernelSpec, build, entry, store
from fi_backend.jit.request import resolve

Make = Callable[..., KernelSpec]
NOBODY = 65534


@pytest.fixture
def built(spec: Make, compiler: CountingCompiler) -> Path:
    """The entry of ``spec()``, just built."""
    build([spec()])
    found = store.find(resolve(spec()))
    assert found is not None
    return found


def edit_manifest(directory: Path, **values: object) -> None:
    path = directory / entry.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def truncate(directory: Path) -> None:
    os.truncate(directory / entry.LIBRARY, 1000)


def flip_a_byte(directory: Path) -> None:
    path = directory / entry.LIBRARY
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_manifest(directory: Path) -> None:
    os.truncate(directory / entry.MANIFEST, 30)


def lose_library(directory: Path) -> None:
    (directory / entry.LIBRARY).unlink()


def link_library(directory: Path) -> None:
    library = directory / entry.LIBRARY
    library.rename(directory.parent / "elsewhere")
    library.symlink_to(directory.parent / "elsewhere")


def open_to_others(directory: Path) -> None:
    (directory / entry.LIBRARY).chmod(0o666)


@pytest.mark.parametrize(
    "damage",
    [truncate, flip_a_byte, cut_manifest, lose_library, link_library, open_to_others],
)
def test_damaged_entry_heals(
    spec: Make, built: Path, compiler: CountingCompiler, damage: Callable[[Path], None]
) -> None:
    damage(built)
    assert store.find(resolve(spec())) is None
    assert build([spec()]).built == ("value_2",)
    assert store.find(resolve(spec())) == built
    assert len(compiler.lines("compile")) == 2


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"format": 0}, "entry format 0"),
        ({"source_key": "0"}, "other sources"),
        ({"flags_key": "0"}, "other flags"),
        ({"level": "avx1024"}, "CPU level avx1024"),
        ({"needs": {"GLIBC": "99.1"}}, "glibc 99.1"),
        ({"files": ["/usr/bin/true|1|1"]}, "the compiler changed: /usr/bin/true"),
    ],
)
def test_entry_for_another_machine_is_a_miss(
    spec: Make,
    built: Path,
    caplog: pytest.LogCaptureFixture,
    values: dict,
    reason: str,
) -> None:
    edit_manifest(built, **values)
    assert store.find(resolve(spec())) is None
    assert reason in caplog.text


def test_changed_compiler_does_not_matter_where_there_is_none(
    spec: Make, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.CXX.name, "/no/such/compiler")
    assert resolve(spec()).drivers is None
    assert store.find(resolve(spec())) == built


def test_better_cpu_level_than_ours_is_never_loaded(
    spec: Make, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = resolve(spec(), level="generic")
    edit_manifest(built, level="avx512_bf16")
    with pytest.raises(entry.UnfitEntryError, match="needs CPU level avx512_bf16"):
        store.check(built, request, prebuilt=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")
@pytest.mark.parametrize("part", ["", entry.LIBRARY, entry.MANIFEST, ".."])
def test_entry_of_another_user_is_not_loaded(
    spec: Make, built: Path, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    os.chown(built / part, NOBODY, NOBODY)
    assert store.find(resolve(spec())) is None
    assert f"owned by uid {NOBODY}" in caplog.text
    assert build([spec()]).built == ("value_2",)
    assert store.find(resolve(spec())) == built


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")
def test_cache_of_another_user_is_left_alone(
    spec: Make,
    built: Path,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    os.chown(tmp_path / "cache" / store.ROOT, NOBODY, NOBODY)
    assert store.find(resolve(spec())) is None
    build([spec()])
    found = store.find(resolve(spec()))
    assert found is not None
    assert tmp_path / "tmpdir" in found.parents
    assert "cannot be used" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")
def test_fallback_of_another_user_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.CACHE_DIR.name, "/proc/no/such")
    planted = tmp_path / "tmpdir" / f"fi_backend-{os.geteuid()}"
    planted.mkdir(mode=0o700)
    os.chown(planted, NOBODY, NOBODY)
    root = store.write_root()
    assert planted not in root.parents
    assert root.stat().st_mode & 0o777 == 0o700
    assert store.read_roots() == [root]


@pytest.mark.parametrize("place", ["under a file", "in /proc"])
def test_home_that_cannot_be_written(
    spec: Make,
    compiler: CountingCompiler,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    place: str,
) -> None:
    (tmp_path / "file").write_text("not a directory")
    home = tmp_path / "file" / "home" if place == "under a file" else Path("/proc/no/home")
    monkeypatch.delenv(env.CACHE_DIR.name)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(home))
    with caplog.at_level(logging.WARNING):
        build([spec(1)])
        build([spec(2)])
    root = tmp_path / "tmpdir" / f"fi_backend-{os.geteuid()}" / store.ROOT
    assert store.find(resolve(spec(1))).parent.parent.parent == root  # type: ignore[union-attr]
    assert root.parent.stat().st_mode & 0o777 == 0o700
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(lines) == 1
    assert str(home) in lines[0]
    assert env.CACHE_DIR.name in lines[0]
    monkeypatch.setattr(store, "_chosen", {})  # a later process finds them there
    assert store.find(resolve(spec(2))) is not None


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv(env.WORKSPACE_BASE.name, str(tmp_path / "base"))
    assert store.base_dir() == tmp_path / "cache"
    monkeypatch.delenv(env.CACHE_DIR.name)
    assert store.base_dir() == tmp_path / "base" / ".cache" / "fi_backend"
    monkeypatch.delenv(env.WORKSPACE_BASE.name)
    assert store.base_dir() == tmp_path / "xdg" / "fi_backend"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the XDG rules say to ignore it
    assert store.base_dir() == tmp_path / "home" / ".cache" / "fi_backend"
    assert not (tmp_path / "home").exists()


def test_open_cache_directory_is_closed(tmp_path: Path) -> None:
    root = tmp_path / "cache" / store.ROOT
    root.mkdir(parents=True)
    root.chmod(0o777)
    assert store.read_roots() == []
    assert store.write_root() == root
    assert root.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_any_umask(spec: Make, compiler: CountingCompiler, umask: int) -> None:
    before = os.umask(umask)
    try:
        build([spec()])
    finally:
        os.umask(before)
    assert build([spec()]).reused == ("value_2",)


def test_old_leftovers_of_other_entries_go(spec: Make, compiler: CountingCompiler) -> None:
    scratch = store.write_root() / "tmp"
    for name, age in (("old", 2 * 24 * 3600), ("young", 3600)):
        (scratch / name).mkdir()
        os.utime(scratch / name, (time.time() - age,) * 2)
    build([spec()])
    assert [path.name for path in scratch.iterdir()] == ["young"]


def test_system_needs_reads_symbol_versions() -> None:
    text = b"\0GLIBC_2.2.5\0GLIBC_2.34\0GLIBC_2.9\0GLIBCXX_3.4.26\0GLIBC_PRIVATE\0"
    assert entry.system_needs(text) == {"GLIBC": "2.34", "GLIBCXX": "3.4.26"}
