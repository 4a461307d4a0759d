"""vLLM on the CPU with two workers, tensor or pipeline parallel: the same tokens as one.

Kernels are compiled once for both. Stages need what pipeline_worker.py brings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.conftest import FI_TINY, fi_tiny_prompts
from e2e.harness import Batch, Result, Task, assert_same_tokens, run_engines

pytestmark = pytest.mark.engine

TOKENS = 48
# Engine arguments of each run; the first finds no compiled kernels.
RUNS: dict[str, dict[str, Any]] = {
    "tensor parallel": {"tensor_parallel_size": 2},
    "one worker": {},
    "pipeline parallel": {
        "pipeline_parallel_size": 2,
        "worker_extension_cls": "e2e.pipeline_worker.PipelineExtension",
        "max_num_batched_tokens": 48,  # chunks of prompts beside decodes, two steps under way
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def results(folder: Path) -> Iterator[dict[str, Result]]:
    """Each run in a process of its own, one after the other: they share a cache of kernels."""
    batches = [Batch(fi_tiny_prompts()[:8], TOKENS)]
    found = {}
    for name, engine in RUNS.items():
        found |= run_engines(
            [Task(name, FI_TINY, "flashinfer", batches, engine=engine)],
            folder / name.replace(" ", "-"),
            environment={"FI_BACKEND_CACHE_DIR": str(folder / "cache")},
            program="e2e.engine_workers",
        )
    return found


def compiles(folder: Path, name: str) -> list[str]:
    """Lines with which a process says that it compiles."""
    log = (folder / name.replace(" ", "-") / "log.txt").read_text(errors="replace")
    return re.findall(r"INFO (compiling [^:\n]*)$", log, re.MULTILINE)


@pytest.mark.parametrize("name", ["tensor parallel", "pipeline parallel"])
def test_two_workers_generate_the_same_tokens(name: str, results: dict[str, Result]) -> None:
    one, two = results["one worker"], results[name]
    assert_same_tokens(one["batches"][0]["tokens"], two["batches"][0]["tokens"])
    runs = [worker["attention_runs"] for worker in two["counters"]]
    assert len(runs) == 2
    assert min(runs) > 0


def num_modules(line: str) -> int:
    """Count the modules that a line announces: it names a single one, or says how many."""
    several = re.fullmatch(r"compiling (\d+) kernel modules", line)
    return int(several[1]) if several else 1


def test_workers_compile_each_module_once(folder: Path, results: dict[str, Result]) -> None:
    """They start together: each compiles what the other has not begun, and waits for the rest."""
    assert results
    lines = compiles(folder, "tensor parallel")
    modules = list((folder / "cache").rglob("*.so"))
    assert 1 <= len(lines) <= 2
    assert sum(map(num_modules, lines)) == len(modules) > 0


@pytest.mark.parametrize("name", ["one worker", "pipeline parallel"])
def test_a_warm_start_compiles_nothing(name: str, folder: Path, results: dict[str, Result]) -> None:
    assert results
    assert compiles(folder, name) == []
