"""vLLM's batch-invariant mode on a GPU: a prompt's logits, bit for bit, whatever is served with it.

vLLM's own products and norms must be as invariant as our attention. So its FLASH_ATTN goes through
the same batches, and where that is not invariant either, nothing is said about ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from e2e.conftest import Models
from e2e.harness import Batch, Result, Task, run_engines
from e2e.shapes import random_prompts

pytestmark = [
    pytest.mark.engine,
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs an NVIDIA GPU; this machine has none"
    ),
]

TOKENS = 8
ENVIRONMENT = {
    "VLLM_BATCH_INVARIANT": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the other one returns no logits
}
ENGINE: dict[str, Any] = {
    "kv_cache_memory_bytes": 1 << 30,
    "gpu_memory_utilization": 0.02,
    "enable_flashinfer_autotune": False,
    # vLLM switches it off for backends of the name FLASHINFER, so ours is asked for as CUSTOM.
    "enable_prefix_caching": True,
}
PROMPTS = random_prompts(256, shortest=8, longest=400)
ONE = 200  # the prompt that is served alone, too
# Engines: the most tokens of a step, and what they are asked one after the other.
RUNS = {
    "large steps": (8192, [range(256), [ONE]]),
    "small steps": (96, [[ONE], range(256)]),
}
BACKENDS = {"ours": "custom", "stock": "FLASH_ATTN"}


@pytest.fixture(scope="module")
def result(
    models: Models, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Result]]:
    """Start every engine; return a function that waits for one by its name."""
    directory = tmp_path_factory.mktemp("invariant")
    folder = models.folder("llama")

    def run(name: str, backend: str, step_tokens: int, asked: list[Any]) -> Result:
        batches = [Batch([PROMPTS[i] for i in which], TOKENS, logprobs=4) for which in asked]
        steps = {"max_num_batched_tokens": step_tokens, "max_num_seqs": min(step_tokens, 256)}
        engine = {**ENGINE, **steps}
        task = Task(name, folder, backend, batches, "bfloat16", engine)
        place = Path(directory, name.replace(" ", "-"))
        return run_engines([task], place, environment=ENVIRONMENT)[name]

    futures: dict[str, Future[Result]] = {}
    with ThreadPoolExecutor(4) as pool:
        for backend, asked_as in BACKENDS.items():
            for name, (step_tokens, asked) in RUNS.items():
                full = f"{backend}, {name}"
                futures[full] = pool.submit(run, full, asked_as, step_tokens, asked)
        yield lambda name: futures[name].result()


def logits(result: Callable[[str], Result], backend: str) -> dict[str, list[Any]]:
    """Return the best logits of every token that prompt ONE and its mates got, by the run."""
    large, small = (result(f"{backend}, {name}")["batches"] for name in RUNS)
    return {
        "among 255 others": large[0]["token_scores"],
        "among 255 others, in chunks": small[1]["token_scores"],
        "alone, found in the cache": large[1]["token_scores"],
        "alone, in chunks": small[0]["token_scores"],
    }


def test_logits_are_bit_equal(result: Callable[[str], Result]) -> None:
    found = {backend: logits(result, backend) for backend in BACKENDS}
    for backend, runs in reversed(found.items()):  # stock first
        together, in_chunks, cached, alone = runs.values()
        is_invariant = together == in_chunks and together[ONE] == cached[0] == alone[0]
        if backend == "stock" and not is_invariant:
            pytest.skip("this vLLM is not batch-invariant with its own FLASH_ATTN either")
        assert is_invariant
    assert len(found["ours"]["alone, in chunks"][0]) == TOKENS


def test_prompts_were_cached_and_cut(result: Callable[[str], Result]) -> None:
    large, small = (result(f"ours, {name}") for name in RUNS)
    assert large["batches"][1]["cached_tokens"][0] > 0
    assert small["largest_step"] <= 96 < len(PROMPTS[ONE])
    assert set(large["layers"]) == set(small["layers"]) == {"FIAttentionImpl"}
    for run in (large, small):
        assert run["counters"]["attention_runs"] == len(run["layers"]) * run["steps"]
