from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from counting_compiler import CountingCompiler

from fi_backend.jit import KernelSpec, build, compile_commands, registry

Make = Callable[..., KernelSpec]


def test_families_group_templates(tmp_path: Path) -> None:
    (tmp_path / "merge_cuda.cu.j2").write_text("// Merge kernels.\nusing A = {{ a }};\n")
    (tmp_path / "merge_cuda_binding.cc.j2").write_text("{# Bindings. #}\n{{ b | cpp }} {{a}}\n")
    (tmp_path / "norm_cpu.cc.j2").write_text("#include <x.h>\n// not a summary\n")
    merge, norm = registry.families(tmp_path)
    assert merge == registry.Family(
        name="merge_cuda",
        target="cuda",
        templates=("merge_cuda.cu.j2", "merge_cuda_binding.cc.j2"),
        parameters=("a", "b"),
        summary="Merge kernels.",
    )
    assert (norm.name, norm.target, norm.parameters, norm.summary) == ("norm_cpu", "cpu", (), "")


def test_own_templates_are_families_with_a_summary() -> None:
    found = registry.families()
    assert found
    assert not [family.name for family in found if not family.summary]


def test_built_says_what_a_load_would_do(
    spec: Make, tree: Path, compiler: CountingCompiler
) -> None:
    build([spec(1)])
    (ready,) = registry.built()
    assert (ready.name, ready.problem, ready.prebuilt) == ("value_1", "", False)
    assert registry.cached_specs() == [spec(1)]
    with (tree / "include" / "tiny" / "base.h").open("a") as header:
        header.write("// edited\n")
    (stale,) = registry.built()
    assert "other sources" in stale.problem
    (stale.directory / "manifest.json").write_text("{")
    (broken,) = registry.built()
    assert broken.manifest is None
    assert "unreadable" in broken.problem
    assert registry.cached_specs() == []


def test_compile_commands(spec: Make, compiler: CountingCompiler, tmp_path: Path) -> None:
    output = tmp_path / "compile_commands.json"
    assert compile_commands.write([spec(1), spec(2), spec(1)], output) == 2
    commands = json.loads(output.read_text())
    assert {Path(command["file"]).name for command in commands} == {"value.cc"}
    for command in commands:
        assert Path(command["file"]).is_file()
        assert command["file"] in command["arguments"]
        assert any(word.startswith("-I") for word in command["arguments"])
