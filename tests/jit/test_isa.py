from __future__ import annotations

import subprocess

import pytest

from fi_backend import env
from fi_backend.errors import UnsupportedError
from fi_backend.jit import isa

AVX2 = "fpu sse2 avx2 fma f16c"
AVX512 = f"{AVX2} avx512f avx512bw avx512dq avx512vl"


@pytest.mark.parametrize(
    ("words", "level"),
    [
        ("fpu sse2", "generic"),
        ("fpu avx2 f16c", "generic"),  # no fma
        (AVX2, "avx2"),
        (f"{AVX2} avx512f", "avx2"),  # Knights Landing: no bw, dq, vl
        (AVX512, "avx512"),
        (f"{AVX512} avx512_bf16", "avx512_bf16"),
    ],
)
def test_level_of_cpuinfo(words: str, level: str) -> None:
    text = f"processor\t: 0\nmodel name\t: x\nflags\t\t: {words}\n\nprocessor\t: 1\n"
    assert isa.best_level(isa.parse_cpuinfo(text)) == level


def test_override_below_the_machine_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "host_level", lambda: "avx512")
    assert isa.resolve() == "avx512"
    monkeypatch.setenv(env.CPU_ISA.name, "avx2")
    assert isa.resolve() == "avx2"


def test_override_above_the_machine_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "host_level", lambda: "avx2")
    monkeypatch.setenv(env.CPU_ISA.name, "avx512_bf16")
    with pytest.raises(UnsupportedError, match=r"avx512_bf16 .* it runs avx2, generic"):
        isa.resolve()


def test_flags_name_features_not_this_machine() -> None:
    for level in isa.LEVELS:
        assert not any("native" in flag or "-march" in flag for flag in isa.flags(level))


@pytest.mark.skipif(isa.host_level() == "generic", reason="levels above generic are for x86-64")
@pytest.mark.parametrize(
    ("level", "macro"),
    [("avx512_bf16", "__AVX512BF16__"), ("avx512", "__AVX512VL__"), ("avx2", "__FMA__")],
)
def test_flags_switch_the_level_on(level: str, macro: str) -> None:
    command = ["g++", *isa.flags(level), "-dM", "-E", "-x", "c++", "/dev/null"]
    defined = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"#define {macro} 1" in defined
    above = {"avx512": "__AVX512BF16__", "avx2": "__AVX512F__"}.get(level, "never")
    assert above not in defined
