"""SGLang on two GPUs, tensor parallel: the tokens of one GPU, as often as triton's.

Sums over two ranks round differently than those of one, so some texts part in either backend: ours
may do so no more often than triton's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from e2e.conftest import FI_TINY, fi_tiny_prompts
from e2e.harness import Batch, Result, Task, first_differences, run_engines
from e2e.sglang_site import sglang_path

pytestmark = [
    pytest.mark.engine,
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]

TOKENS = 48
ENGINE: dict[str, Any] = {
    "max_running_requests": 32,
    "max_total_tokens": 16384,
    "mem_fraction_static": 0.5,
    "cuda_graph_max_bs_decode": 32,
}
RUNS = {
    f"{backend} on {gpus}, page {page}": (backend, gpus, page)
    for backend, page in (("fi_backend", 1), ("fi_backend", 64), ("triton", 1))
    for gpus in (1, 2)
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sglang-two-gpus")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Result]:
    try:
        path = sglang_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    batches = [Batch(fi_tiny_prompts(), TOKENS)]
    found = {}
    for name, (backend, gpus, page) in RUNS.items():
        engine = {**ENGINE, "tp_size": gpus, "page_size": page}
        found |= run_engines(
            [Task(name, FI_TINY, backend, batches, "bfloat16", engine)],
            folder / name.replace(" ", "-"),
            environment={"PYTHONPATH": path, "TORCHDYNAMO_DISABLE": "0"},
            program="e2e.sglang_engine",
        )
    return found


def parted(results: dict[str, Result], name: str) -> int:
    """Count the texts that two GPUs write otherwise than one."""
    one, two = (results[name.format(gpus)]["batches"][0]["tokens"] for gpus in (1, 2))
    assert len(one) == 32
    return len(first_differences(one, two))


@pytest.mark.parametrize("page", [1, 64])
def test_two_gpus_write_what_one_does(page: int, folder: Path, results: dict[str, Result]) -> None:
    stock = parted(results, "triton on {}, page 1")
    assert parted(results, f"fi_backend on {{}}, page {page}") <= stock + 6 < 32
    for gpus in (1, 2):
        name = f"fi_backend on {gpus}, page {page}"
        assert results[name]["page_size"] == page
        log = (folder / name.replace(" ", "-") / "log.txt").read_text(errors="replace")
        assert all(f"serves attention on cuda:{rank}" in log for rank in range(gpus))
