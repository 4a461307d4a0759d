from __future__ import annotations

from pathlib import Path

import pytest

from fi_backend import env
from fi_backend.errors import EnvironmentVariableError


def test_names_are_unique_and_prefixed() -> None:
    names = [variable.name for variable in env.VARIABLES]
    assert len(set(names)) == len(names) >= 20
    assert all(name.startswith(env.PREFIX) for name in names)
    assert all(variable.meaning.endswith(".") for variable in env.VARIABLES)


def test_nothing_set_gives_every_default() -> None:
    for variable in env.VARIABLES:
        assert variable.get({}) == variable.default
        assert variable.source({}) is None


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        (env.JIT_DEBUG, "1", True),
        (env.JIT_DEBUG, " Off ", False),
        (env.MAX_JOBS, "12", 12),
        (env.LOCK_TIMEOUT, "0.5", 0.5),
        (env.CACHE_DIR, "/a/b", Path("/a/b")),
        (env.EXTRA_CFLAGS, "-DA='x y' -O2", ("-DA=x y", "-O2")),
        (env.CPU_ISA, "AVX2", "avx2"),
        (env.LOGLEVEL, "5", 5),
        (env.LOGLEVEL, "10", 5),
        (env.CXX, "ccache g++", ("ccache", "g++")),
    ],
)
def test_good_values(variable: env.Variable, text: str, value: object) -> None:
    assert variable.get({variable.name: text}) == value
    assert variable.source({variable.name: text}) == variable.name


@pytest.mark.parametrize(
    ("variable", "text", "allowed"),
    [
        (env.JIT_VERBOSE, "maybe", "1/true/yes/on or 0/false/no/off"),
        (env.MAX_JOBS, "0", "integer of at least 1"),
        (env.MAX_JOBS, "-3", "integer of at least 1"),
        (env.MAX_JOBS, "4.0", "integer of at least 1"),
        (env.LOCK_TIMEOUT, "soon", "seconds"),
        (env.LOCK_TIMEOUT, "nan", "seconds"),
        (env.LOCK_TIMEOUT, "inf", "seconds"),
        (env.CACHE_DIR, "relative/dir", "absolute path"),
        (env.EXTRA_LDFLAGS, "'unclosed", "shell-quoted words"),
        (env.CPU_ISA, "avx1024", "avx512_bf16, avx512, avx2, generic"),
        (env.LOGLEVEL, "2", "one of 0"),
        (env.LOGGING_LEVEL, "loud", "debug, info"),
    ],
)
def test_bad_value_names_variable_value_and_allowed(
    variable: env.Variable, text: str, allowed: str
) -> None:
    with pytest.raises(EnvironmentVariableError) as caught:
        variable.get({variable.name: text})
    message = str(caught.value)
    assert f"{variable.name}={text!r}" in message
    assert allowed in message
    assert "unset it" in message


def test_own_name_wins_over_the_plain_one() -> None:
    environ = {"MAX_JOBS": "2", "FI_BACKEND_MAX_JOBS": "3"}
    assert env.MAX_JOBS.get(environ) == 3
    assert env.MAX_JOBS.get({"MAX_JOBS": "2"}) == 2
    with pytest.raises(EnvironmentVariableError, match="MAX_JOBS='many'"):
        env.MAX_JOBS.get({"MAX_JOBS": "many"})


def test_empty_counts_as_unset() -> None:
    assert env.CACHE_DIR.get({"FI_BACKEND_CACHE_DIR": " "}) is None


def test_read_at_each_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_BACKEND_CHECKED", "1")
    assert env.CHECKED.get()
    monkeypatch.setenv("FI_BACKEND_CHECKED", "0")
    assert not env.CHECKED.get()


def test_unknown_names_are_found() -> None:
    environ = {"FI_BACKEND_CACHEDIR": "/x", "FI_BACKEND_CACHE_DIR": "/x", "OTHER": "1"}
    assert env.unknown_names(environ) == ["FI_BACKEND_CACHEDIR"]
