"""vLLM on two GPUs, tensor parallel: the tokens of one GPU, kernels that are compiled once.

Sums over two ranks round differently than those of one, so some texts part in either backend: ours
may do so no more often than FLASH_ATTN.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from e2e.conftest import FI_TINY, fi_tiny_prompts
from e2e.harness import Batch, Result, Task, first_differences, run_engines
from e2e.test_vllm_cuda import in_graphs
from e2e.test_vllm_workers import compiles, num_modules

pytestmark = [
    pytest.mark.engine,
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]

TOKENS = 48
BACKENDS = {"ours": "flashinfer", "stock": "FLASH_ATTN"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two-gpus")


@pytest.fixture(scope="module")
def results(folder: Path) -> Iterator[dict[str, Result]]:
    """Each run in a process of its own; ours on two GPUs comes first and finds nothing compiled."""
    batches = [Batch(fi_tiny_prompts(), TOKENS)]
    found = {}
    for gpus in (2, 1):
        for name, backend in BACKENDS.items():
            full = f"{name} on {gpus}"
            engine = {**in_graphs("FULL_DECODE_ONLY"), "tensor_parallel_size": gpus}
            found |= run_engines(
                [Task(full, FI_TINY, backend, batches, "bfloat16", engine)],
                folder / full.replace(" ", "-"),
                environment={
                    "FI_BACKEND_CACHE_DIR": str(folder / "cache"),
                    "VLLM_USE_FLASHINFER_SAMPLER": "0",
                    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
                },
                program="e2e.engine_workers",
            )
    return found


def parted(results: dict[str, Result], name: str) -> int:
    """Count the texts that two GPUs write otherwise than one."""
    one, two = (results[f"{name} on {gpus}"]["batches"][0]["tokens"] for gpus in (1, 2))
    return len(first_differences(one, two))


def test_two_gpus_write_what_one_does(results: dict[str, Result]) -> None:
    texts = len(results["ours on 1"]["batches"][0]["tokens"])
    assert texts == 32
    assert parted(results, "ours") <= parted(results, "stock") + 6 < texts
    runs = [worker["attention_runs"] for worker in results["ours on 2"]["counters"]]
    assert len(runs) == 2
    assert min(runs) > 0
    assert not any(worker["attention_runs"] for worker in results["stock on 2"]["counters"])


def test_ranks_compile_each_module_once(folder: Path, results: dict[str, Result]) -> None:
    assert results
    lines = compiles(folder, "ours on 2")
    assert sum(map(num_modules, lines)) == len(list((folder / "cache").rglob("*.so"))) > 0
    assert compiles(folder, "ours on 1") == []
