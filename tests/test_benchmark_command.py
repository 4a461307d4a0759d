"""`python -m benchmarks`: every routine on the CPU, checked against torch, and its files."""

from __future__ import annotations

import csv
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fi_backend
from benchmarks.__main__ import main
from benchmarks.command import _compare
from benchmarks.csv_file import COLUMNS, append_rows
from benchmarks.routines import ROUTINES
from fi_backend.trace import TEMPLATES

# Small, with lengths that fill no page and no tile.
SMALL = (
    "--device cpu --num_iters 1 --batch_size 3 --s_qo 5 --s_kv 37 --hidden_size 128 "
    "--num_qo_heads 4 --num_kv_heads 2 --head_dim_qk 64 --head_dim_vo 64 "
    "--q_dtype float32 --kv_dtype float32"
)
# Each routine as it is, and with every flag that it knows.
FLAGS = ("causal", "random_actual_seq_len", "interleave")
FORMS = [
    (name, flags)
    for name, routine in sorted(ROUTINES.items())
    for flags in {"", " ".join(f"--{flag}" for flag in FLAGS if flag in routine.used)}
]
# FlashInfer has these; what it times with them is what we time.
FLASHINFER_ROUTINES = {
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "apply_llama31_rope",
    "apply_llama31_rope_pos_ids",
    "apply_rope",
    "apply_rope_pos_ids",
    "apply_rope_with_cos_sin_cache",
    "fused_add_rmsnorm_quant",
    "rmsnorm",
    "rmsnorm_quant",
}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def wrong_library(monkeypatch: pytest.MonkeyPatch) -> str:
    """A library whose norm is not ours, and that has nothing else."""
    library = ModuleType("wrong_library")
    library.rmsnorm = lambda input, weight: fi_backend.rmsnorm(input, weight) + 0.01  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wrong_library", library)
    return "wrong_library"


def test_routines_have_the_names_that_flashinfer_gives_them() -> None:
    assert set(ROUTINES) >= FLASHINFER_ROUTINES


@pytest.mark.parametrize(("name", "options"), sorted(FORMS))
def test_routine_on_the_cpu(name: str, options: str, tmp_path: Path) -> None:
    used = ROUTINES[name].used
    path = tmp_path / "rows.csv"
    command = f"--routine {name} --refcheck --csv {path} {SMALL} {options}"
    assert main(command.split()) == 0
    (row,) = read(path)
    assert row["refcheck"] == "passed"
    assert float(row["median_time"]) > 0
    assert float(row["tb_per_sec"]) >= 0
    assert {column for column in used if row[column]} == set(used)


def test_every_template_but_those_of_single_calls_has_a_routine() -> None:
    ops = {routine.template.op_type for routine in ROUTINES.values()}
    without = {"single_decode", "single_prefill", "merge_state_in_place", "packbits"}
    assert {template.op_type for template in TEMPLATES} - ops == without


def test_a_wrong_result_fails_unless_allowed(
    wrong_library: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"--routine rmsnorm --backends fi_backend {wrong_library} {SMALL}".split()
    assert main([*command, "--refcheck"]) == 1
    printed = capsys.readouterr()
    ours, wrong = printed.out.splitlines()
    assert ours.endswith("passed")
    assert wrong.endswith("FAILED")
    assert "1 results are wrong or missing" in printed.err
    assert main(command) == 0
    assert main([*command, "--refcheck", "--allow_output_mismatch"]) == 0


def test_a_backend_that_cannot_is_reported(
    wrong_library: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for backend, problem in (
        (wrong_library, "AttributeError"),
        ("no_such_library", "ModuleNotFoundError"),
        ("fi_backend:trtllm", "UnsupportedError"),
    ):
        options = f"--routine BatchDecodeWithPagedKVCacheWrapper --backends {backend} fi_backend"
        assert main([*options.split(), *SMALL.split()]) == 1
        failed, ours = capsys.readouterr().out.splitlines()
        assert problem in failed
        assert " us " in ours


def test_a_testlist_runs_its_lines_with_the_options_around_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "cases.txt"
    listed.write_text(
        "# two cases\n\n"
        "--routine rmsnorm --batch_size 2 --case_tag 'a, b'\n"
        "--routine silu_and_mul --batch_size 4  # the last\n"
    )
    path = tmp_path / "rows.csv"
    outer = ["--testlist", str(listed), "--csv", str(path), "--refcheck", *SMALL.split()]
    assert main([*outer, "--generate_repro_command"]) == 0
    rows = read(path)
    assert [(row["routine"], row["batch_size"]) for row in rows] == [
        ("rmsnorm", "2"),
        ("silu_and_mul", "4"),
    ]
    assert rows[0]["case_tag"] == "a, b"
    again = shlex.split(rows[1]["repro_command"])
    assert again[:3] == ["python", "-m", "benchmarks"]
    assert rows[1]["repro_command"] in capsys.readouterr().out
    assert main([*again[3:], "--csv", str(path), "--num_iters", "1"]) == 0
    assert read(path)[2]["hidden_size"] == rows[1]["hidden_size"]


def test_columns_stay() -> None:
    """Files of earlier runs are added to, and tools read them: columns may only be appended."""
    assert COLUMNS[:7] == (
        "routine",
        "median_time",
        "std_time",
        "tflops",
        "tb_per_sec",
        "backend",
        "resolved_backend",
    )
    assert len(COLUMNS) == len(set(COLUMNS)) == 31


def test_a_file_of_other_columns_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has other columns"):
        append_rows(path, [{"routine": "x"}])
    assert path.read_text() == "a,b\n1,2\n"
    with pytest.raises(ValueError, match="no_such_column"):
        append_rows(tmp_path / "new.csv", [{"no_such_column": 1}])


def test_comparison() -> None:
    infinite = torch.tensor([float("-inf"), 1.0])
    assert _compare(infinite, infinite.clone()) == (0.0, True)
    assert _compare(torch.tensor([float("nan")]), torch.ones(1))[1] is False
    assert _compare(torch.tensor([1.001]), torch.ones(1))[1] is False
    assert _compare(torch.tensor([1.01]).bfloat16(), torch.ones(1).bfloat16())[1] is True
