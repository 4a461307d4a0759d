from __future__ import annotations

import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import jinja2
import pytest

from fi_backend.jit import KernelSpec
from fi_backend.jit.render import cpp_literal, render, render_text

Make = Callable[..., KernelSpec]

GOLDEN = """\
#include <bindings/cpu/norm.h>
using Traits = fi::NormTraits<fi::bf16, 128, true, 0.5>;
"""
TEMPLATE = """\
#include <bindings/cpu/norm.h>
using Traits = fi::NormTraits<{{ type }}, {{ dim }}, {{ gemma | cpp }}, {{ eps | cpp }}>;
"""
PARAMETERS = {"type": "fi::bf16", "dim": 128, "gemma": True, "eps": 0.5}


def test_golden() -> None:
    assert render_text(TEMPLATE, PARAMETERS) == GOLDEN


def test_missing_parameter_raises() -> None:
    with pytest.raises(jinja2.UndefinedError, match="gemma"):
        render_text(TEMPLATE, {k: v for k, v in PARAMETERS.items() if k != "gemma"})


def test_unused_parameter_raises(spec: Make) -> None:
    with pytest.raises(ValueError, match=r"no template .* uses parameter \['zebra'\]"):
        render(spec(parameters=(("number", 1), ("zebra", 2))))


@pytest.mark.parametrize("value", [True, 0.5, float("inf"), None])
def test_python_spelling_never_reaches_cpp(value: object) -> None:
    with pytest.raises(TypeError, match="cpp"):
        render_text("{{ x }}", {"x": value})


def test_unit_names_lose_the_template_suffix(spec: Make) -> None:
    assert list(render(spec())) == ["value.cc"]
    assert "kBase + 2;" in render(spec())["value.cc"]


def test_missing_template_names_where_it_looked(spec: Make, tree: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tree / "templates" / "gone.cc.j2")):
        render(spec(templates=("gone.cc.j2",)))


INTEGERS = [0, -1, 2**31 - 1, -(2**31), 2**31, 2**63 - 1, -(2**63), 2**64 - 1]
DOUBLES = [0.0, -0.0, 1e-45, 0.1, 1e300, -2.5, math.inf, -math.inf]
STRINGS = ["", 'quote " backslash \\', "tab\tnewline\n", "??/trigraph", "snow ☃ 1"]


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1])
def test_integer_beyond_64_bits_raises(value: int) -> None:
    with pytest.raises(ValueError, match="64 bits"):
        cpp_literal(value)


def test_literals_mean_the_same_in_cpp(tmp_path: Path) -> None:
    """Let the compiler read back every literal; -Woverflow and friends count as failure."""
    lines = ["#include <cstdio>", "#include <cmath>", "#include <cstring>", "int main() {"]
    for value in INTEGERS:
        kind = "unsigned long long" if value >= 2**63 else "long long"
        image = value % 2**64
        lines.append(f"static_assert({image}ULL == (unsigned long long)({cpp_literal(value)}));")
        lines.append(f"{{ {kind} x = {cpp_literal(value)}; (void)x; }}")
    for number in DOUBLES:
        lines.append(f'std::printf("%a\\n", {cpp_literal(number)});')
    lines.append(f"static_assert({cpp_literal(True)} && !{cpp_literal(False)});")
    for text in STRINGS:
        data = ", ".join(map(str, [*text.encode(), 0]))
        lines.append(
            f"{{ const unsigned char want[] = {{{data}}}; "
            f"if (std::memcmp(want, {cpp_literal(text)}, sizeof want)) return 1; }}"
        )
    lines.append(f"return !std::isnan({cpp_literal(math.nan)}); }}")
    source = tmp_path / "literals.cc"
    source.write_text("\n".join(lines))
    program = tmp_path / "literals"
    subprocess.run(["g++", "-std=c++17", "-Wall", "-Werror", source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    printed = [float.fromhex(x) if "in" not in x else float(x) for x in done.stdout.split()]
    assert list(map(repr, printed)) == list(map(repr, DOUBLES))
