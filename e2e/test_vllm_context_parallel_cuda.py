"""vLLM on two GPUs, decode context parallel: as close to one GPU's text as FLASH_ATTN comes.

bf16 rounds otherwise when two ranks' results are merged, so some texts part in either backend: ours
may do so no more often than FLASH_ATTN's.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from e2e.conftest import Models
from e2e.harness import Batch, Result, Task, first_differences, run_engines
from e2e.shapes import random_prompts
from e2e.test_vllm_cuda import in_graphs

pytestmark = [
    pytest.mark.engine,
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]

TWO_GPUS = {"tensor_parallel_size": 2, "decode_context_parallel_size": 2}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "one GPU": ("FLASH_ATTN", in_graphs("FULL_DECODE_ONLY")),
    "stock": ("FLASH_ATTN", {**in_graphs("FULL_DECODE_ONLY"), **TWO_GPUS}),
    "ours": ("flashinfer", {**in_graphs("FULL_DECODE_ONLY"), **TWO_GPUS}),
    "ours, all in graphs": ("custom", {**in_graphs("FULL"), **TWO_GPUS}),
}


@pytest.fixture(scope="module")
def results(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Every engine has processes of its own, and all run at the same time."""
    folder = tmp_path_factory.mktemp("context-parallel")
    batch = Batch(random_prompts(32, shortest=8, longest=400), 48)

    def run(name: str) -> dict[str, Result]:
        backend, engine = RUNS[name]
        task = Task(name, models.folder("mqa"), backend, [batch], "bfloat16", engine)
        directory: Path = folder / name.replace(" ", "-")
        environment = {
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        }
        return run_engines([task], directory, environment=environment, program="e2e.engine_workers")

    models.folder("mqa")
    found: dict[str, Result] = {}
    with ThreadPoolExecutor(len(RUNS)) as pool:
        for result in pool.map(run, RUNS):
            found |= result
    return found


def parted(results: dict[str, Result], name: str) -> int:
    """Count the texts that a run writes otherwise than FLASH_ATTN on one GPU."""
    one, two = (results[run]["batches"][0]["tokens"] for run in ("one GPU", name))
    assert len(one) == 32
    return len(first_differences(one, two))


@pytest.mark.parametrize("name", ["ours", "ours, all in graphs"])
def test_two_gpus_write_what_one_does(name: str, results: dict[str, Result]) -> None:
    assert parted(results, name) <= parted(results, "stock") + 6 < 32
    runs = [worker["attention_runs"] for worker in results[name]["counters"]]
    assert len(runs) == 2
    assert min(runs) > 0
    assert not any(worker["attention_runs"] for worker in results["stock"]["counters"])
