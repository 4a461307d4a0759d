"""vLLM on a GPU as it comes: the tokens of the same engine with FI_BACKEND_SHARED_PREFIX=0.

Most requests begin with one of two system prompts of thousands of tokens, which are in the cache;
decode steps and mixed steps then attend to each of these once. Where tokens differ, logits must be
nearly tied, as in e2e/test_vllm_cuda.py: within 2 bf16 ulp, or within what engines that share
nothing, ours and two of vLLM's, differ by among themselves on the same requests.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from e2e.conftest import Models
from e2e.harness import Batch, Result, Task, first_differences, run_engines
from e2e.scores import token_divergences
from e2e.shapes import random_prompts
from e2e.test_vllm_cuda import EAGER, ENVIRONMENT, LARGEST_TIE, NEAR_TIE, V1, in_graphs

pytestmark = [
    pytest.mark.engine,
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs an NVIDIA GPU; this machine has none"
    ),
]

TOKENS = 48
PREFIX_TOKENS = 5000  # enough for the groups of the smaller model below to be worth a launch
SHARING, OTHERS = 96, 8
SYSTEM_PROMPTS = random_prompts(2, shortest=PREFIX_TOKENS, longest=PREFIX_TOKENS, seed=1)
ENGINE: dict[str, Any] = {
    "kv_cache_memory_bytes": 1 << 30,
    "max_model_len": 8192,
    "max_num_seqs": 128,
    "max_num_batched_tokens": 1024,
    "enable_prefix_caching": True,
    "hf_overrides": {"max_position_embeddings": 8192},
}


def prompts() -> list[list[int]]:
    """Requests of both system prompts and of none, in any order."""
    endings = random_prompts(SHARING, shortest=1, longest=60, seed=2)
    sharing = [SYSTEM_PROMPTS[i % 2] + ending for i, ending in enumerate(endings)]
    every = sharing + random_prompts(OTHERS, shortest=8, longest=400, seed=3)
    random.Random(0).shuffle(every)
    return every


def graphs(mode: str) -> dict[str, Any]:
    """Engine arguments: graphs of this mode, of as many requests as there are, too."""
    engine = in_graphs(mode)
    sizes = {"cudagraph_capture_sizes": [1, 32, SHARING + OTHERS]}
    engine["compilation_config"] = engine["compilation_config"] | sizes
    return engine | ENGINE


# Engines: the backend as it is asked for, its arguments, and what FI_BACKEND_SHARED_PREFIX is.
DECODE_GRAPHS = graphs("FULL_DECODE_ONLY")
ENGINES: dict[str, tuple[str, dict[str, Any], str]] = {
    "off": ("flashinfer", DECODE_GRAPHS, "0"),
    "on": ("flashinfer", DECODE_GRAPHS, ""),
    "on, all graphs": ("flashinfer", graphs("FULL"), ""),
    "forgetting": ("flashinfer", DECODE_GRAPHS, ""),
    "stock": ("FLASH_ATTN", DECODE_GRAPHS, "0"),
    "triton": ("TRITON_ATTN", EAGER | ENGINE, "0"),
}


def task_of(name: str, folder: Path) -> Task:
    """Return what an engine is asked: each system prompt, then all requests at once."""
    backend, engine, _ = ENGINES[name]
    fill = [Batch([prompt], 1) for prompt in SYSTEM_PROMPTS]
    batches = [*fill, Batch(prompts(), TOKENS, logprobs=8)]
    forgets = name == "forgetting"
    return Task(name, folder, backend, batches, "bfloat16", engine, forget_prefixes=forgets)


@pytest.fixture(scope="module")
def result(
    models: Models, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Result]]:
    """Start every engine; return a function that waits for one by its name."""
    directory = tmp_path_factory.mktemp("shared")
    folder = models.folder("llama")

    def run(name: str) -> Result:
        place = Path(directory, name.replace(" ", "-"))
        variables = {**ENVIRONMENT, **V1, "FI_BACKEND_SHARED_PREFIX": ENGINES[name][2]}
        return run_engines([task_of(name, folder)], place, environment=variables)[name]

    with ThreadPoolExecutor(len(ENGINES)) as pool:
        futures: dict[str, Future[Result]] = {name: pool.submit(run, name) for name in ENGINES}
        yield lambda name: futures[name].result()


def gaps(result: Callable[[str], Result], want: str, got: str) -> list[float]:
    """Return how far `want` puts the first other token of each text below its own, in ulp."""
    wanted, found = (result(name)["batches"][-1] for name in (want, got))
    return token_divergences(wanted["tokens"], wanted["token_scores"], found["tokens"])


@pytest.mark.parametrize("name", ["on", "on, all graphs"])
def test_tokens_are_those_of_the_switch_off_up_to_near_ties(
    name: str, result: Callable[[str], Result]
) -> None:
    pairs = itertools.permutations(("off", "stock", "triton"), 2)
    between_others = max(max(gaps(result, *pair), default=0.0) for pair in pairs)
    assert between_others <= LARGEST_TIE
    assert max(gaps(result, "off", name), default=0.0) <= max(NEAR_TIE, between_others)
    want, got = (result(which)["batches"][-1]["tokens"] for which in ("off", name))
    differences = first_differences(want, got)
    print(f"{len(differences)} of {len(want)} texts differ")
    agreeing = sum(differences.get(text, TOKENS) for text in range(len(want)))
    assert agreeing > 0.5 * len(want) * TOKENS


@pytest.mark.parametrize("name", ENGINES)
def test_system_prompts_came_from_the_cache(name: str, result: Callable[[str], Result]) -> None:
    """In whole pages, of which requests of one system prompt thus have the same."""
    cached = result(name)["batches"][-1]["cached_tokens"]
    expected = PREFIX_TOKENS - PREFIX_TOKENS % 16
    assert sum(tokens >= expected for tokens in cached) == SHARING


def test_what_is_shared_matters(result: Callable[[str], Result]) -> None:
    """The comparison means something only if prefixes are shared, and losing them is noticed."""
    other = gaps(result, "off", "forgetting")
    assert len(other) > SHARING // 2
    assert max(other) > LARGEST_TIE
