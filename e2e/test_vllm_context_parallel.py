"""vLLM on the CPU, decode context parallel: two workers with half of a cache each, stock tokens.

vLLM 0.32 has the scheduler and the block tables for it on the CPU, but no kernel that says where
tokens go; context_parallel_worker.py brings one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from e2e.conftest import Models
from e2e.harness import Batch, Result, Task, assert_same_tokens, run_engines
from e2e.shapes import random_prompts

pytestmark = pytest.mark.engine

TWO_RANKS: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "decode_context_parallel_size": 2,
    "worker_extension_cls": "e2e.context_parallel_worker.ContextParallelExtension",
    "max_num_batched_tokens": 96,  # chunks of prompts beside decodes
    "block_size": 32,
}
DRAFTS = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_max": 4,
    "prompt_lookup_min": 2,
}
RUNS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "stock": (None, {}),
    "token by token": ("flashinfer", TWO_RANKS),
    "in half pages, with drafts": (
        "custom",
        {**TWO_RANKS, "dcp_kv_cache_interleave_size": 16, "speculative_config": DRAFTS},
    ),
}


@pytest.fixture(scope="module")
def results(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    folder = tmp_path_factory.mktemp("context-parallel")
    batch = Batch(random_prompts(8, shortest=8, longest=160), 48)
    found = {}
    for name, (backend, engine) in RUNS.items():
        task = Task(name, models.folder("mqa"), backend, [batch, batch], engine=engine)
        directory: Path = folder / name.replace(" ", "-")
        found |= run_engines([task], directory, program="e2e.engine_workers")
    return found


@pytest.mark.parametrize("name", [name for name in RUNS if name != "stock"])
def test_two_workers_with_half_a_cache_write_what_stock_does(
    name: str, results: dict[str, Result]
) -> None:
    for want, got in zip(results["stock"]["batches"], results[name]["batches"], strict=True):
        assert_same_tokens(want["tokens"], got["tokens"])
    assert sum(results[name]["batches"][1]["cached_tokens"]) > 0
    for worker in results[name]["counters"]:  # the cached tokens, and those of the step
        assert worker["attention_runs"] == 2 * worker["layer_calls"] > 0
