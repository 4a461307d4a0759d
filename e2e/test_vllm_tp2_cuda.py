"""vLLM on two GPUs, tensor or pipeline parallel: the tokens of one GPU, kernels compiled once.

Sums over two ranks round differently than those of one, and two stages make other batches, so some
texts part in either backend: ours may do so no more often than FLASH_ATTN.
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
    for size, gpus in (("tensor", 2), ("pipeline", 2), ("tensor", 1)):
        for name, backend in BACKENDS.items():
            full = f"{name} on {gpus}" if size == "tensor" else f"{name} in {gpus} stages"
            engine = {**in_graphs("FULL_DECODE_ONLY"), f"{size}_parallel_size": gpus}
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


def parted(results: dict[str, Result], name: str, split: str) -> int:
    """Count the texts that two GPUs write otherwise than one."""
    one, two = (results[f"{name} {of}"]["batches"][0]["tokens"] for of in ("on 1", split))
    return len(first_differences(one, two))


@pytest.mark.parametrize("split", ["on 2", "in 2 stages"])
def test_two_gpus_write_what_one_does(split: str, results: dict[str, Result]) -> None:
    texts = len(results["ours on 1"]["batches"][0]["tokens"])
    assert texts == 32
    assert parted(results, "ours", split) <= parted(results, "stock", split) + 6 < texts
    runs = [worker["attention_runs"] for worker in results[f"ours {split}"]["counters"]]
    assert len(runs) == 2
    assert min(runs) > 0
    assert not any(worker["attention_runs"] for worker in results[f"stock {split}"]["counters"])


def test_ranks_compile_each_module_once(folder: Path, results: dict[str, Result]) -> None:
    assert results
    lines = compiles(folder, "ours on 2")
    assert sum(map(num_modules, lines)) == len(list((folder / "cache").rglob("*.so"))) > 0
    assert compiles(folder, "ours on 1") == []
