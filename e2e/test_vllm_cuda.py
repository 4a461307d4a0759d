"""vLLM on a GPU, bf16: our backend against FLASH_ATTN, in eager steps and in full CUDA graphs.

Every engine has a process of its own and all run at the same time. Weights have a standard
deviation of 0.05 and more, so that attention decides tokens; where ours differ from FLASH_ATTN's,
its logits must be nearly tied: within 2 bf16 ulp, or within what vLLM's own TRITON_ATTN differs
from it by on these models, prompts and texts; and given texts may score differently no more often
than between those two. That is the yardstick: two engines that a user may choose between.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from e2e.conftest import Models
from e2e.harness import Batch, Result, Task, first_differences, run_engines
from e2e.scores import divergences, token_divergences
from e2e.shapes import PLAIN_SHAPES, random_prompts

pytestmark = [
    pytest.mark.engine,
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs an NVIDIA GPU; this machine has none"
    ),
]

MODELS = ("fi-tiny", *PLAIN_SHAPES)
TOKENS = 64
# Mixed steps of this many tokens or fewer are in a graph too where the mode is FULL.
STEP_TOKENS = 256
ENVIRONMENT = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}  # it would be compiled for a minute
V1, V2 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}, {"VLLM_USE_V2_MODEL_RUNNER": "1"}
EAGER: dict[str, Any] = {
    "kv_cache_memory_bytes": 1 << 29,  # instead of a share of a GPU that engines have in common
    "gpu_memory_utilization": 0.02,
    "max_num_batched_tokens": STEP_TOKENS,
    "enable_flashinfer_autotune": False,
}


def in_graphs(mode: str) -> dict[str, Any]:
    """Engine arguments: graphs of this mode, captured from the model's Python code as it is."""
    sizes = [1, 2, 4, 8, 16, 32] if mode == "FULL_DECODE_ONLY" else [1, 8, 32, 64, 128, 256]
    return {
        **EAGER,
        "enforce_eager": False,
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": mode,
            "cudagraph_capture_sizes": sizes,
        },
    }


DECODE_GRAPHS, ALL_GRAPHS = in_graphs("FULL_DECODE_ONLY"), in_graphs("FULL")
# The V2 model runner returns no logits.
WITHOUT_LOGITS = {"logprobs_mode": "raw_logprobs"}


def texts(models: Models, model: str) -> list[list[int]]:
    """Texts to score, of some hundred tokens: for the trained model of the kind it knows."""
    if model != "fi-tiny":
        return random_prompts(16, shortest=64, longest=400)
    source = Path(json.decoder.__file__).read_bytes()
    return [[1, *(byte + 3 for byte in source[i : i + 250])] for i in range(0, 13 * 900, 900)]


def all_tasks(models: Models) -> Iterator[tuple[Task, dict[str, str]]]:
    """Every engine of this module, and its environment."""

    def task(name: str, model: str, backend: str, engine: dict[str, Any], **more: Any) -> Task:
        logprobs = None if "logprobs_mode" in engine else 8
        batches = [Batch(models.prompts(model), TOKENS, logprobs=logprobs)]
        if logprobs is not None:
            batches.append(Batch(texts(models, model), 1, prompt_logprobs=8))
        folder = models.folder(model)
        return Task(name, folder, backend, batches, "bfloat16", engine, **more)

    for model in MODELS:
        yield task(f"stock {model}", model, "FLASH_ATTN", DECODE_GRAPHS), V1
        yield task(f"ours {model}", model, "flashinfer", DECODE_GRAPHS), V1
    for model in MODELS:
        yield task(f"triton {model}", model, "TRITON_ATTN", EAGER), V1
    traced = Batch(models.prompts("fi-tiny")[:8], 8)
    yield task("eager", "fi-tiny", "custom", EAGER), V1
    yield task("zeroed", "fi-tiny", "custom", DECODE_GRAPHS, zero_attention=True), V1
    v2_decode, v2_all = {**DECODE_GRAPHS, **WITHOUT_LOGITS}, {**ALL_GRAPHS, **WITHOUT_LOGITS}
    yield task("decode graphs", "fi-tiny", "FlashInfer", v2_decode, traced=traced), V2
    yield task("all graphs", "llama", "CUSTOM", v2_all, traced=traced), V2
    yield (
        task("no waiting", "qwen3", "flashinfer", v2_decode),
        {**V2, "VLLM_GPU_SYNC_CHECK": "error"},
    )


@pytest.fixture(scope="module")
def result(
    models: Models, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Result]]:
    """Start every engine; return a function that waits for one by its name."""
    directory = tmp_path_factory.mktemp("cuda")

    def run(task: Task, environment: dict[str, str]) -> Result:
        folder = Path(directory, task.name.replace(" ", "-"))
        return run_engines([task], folder, environment={**ENVIRONMENT, **environment})[task.name]

    futures: dict[str, Future[Result]] = {}
    with ThreadPoolExecutor(16) as pool:
        for task, environment in all_tasks(models):
            futures[task.name] = pool.submit(run, task, environment)
        yield lambda name: futures[name].result()


OURS = {
    **{f"ours {model}": model for model in MODELS},
    "eager": "fi-tiny",
    "decode graphs": "fi-tiny",
    "all graphs": "llama",
    "no waiting": "qwen3",
}


NEAR_TIE = 2.0  # ulp
# Stock backends that differ by more than this are no yardstick.
LARGEST_TIE = 8.0


def generated(result: Result) -> list[list[int]]:
    tokens: list[list[int]] = result["batches"][0]["tokens"]
    return tokens


def stock_gaps(model: str, result: Callable[[str], Result]) -> tuple[list[float], list[float]]:
    """Return the gaps between the two stock backends, in ulp: of drawn tokens, of given texts."""
    stock, other = (result(f"{backend} {model}") for backend in ("stock", "triton"))
    drawn = stock["batches"][0]
    return (
        token_divergences(drawn["tokens"], drawn["token_scores"], generated(other)),
        divergences(*(run["batches"][1]["scores"] for run in (stock, other))),
    )


def tied_within(result: Callable[[str], Result]) -> float:
    """Return how far apart, in ulp, logits may lie where another token is no mistake."""
    gaps = [gap for model in MODELS for some in stock_gaps(model, result) for gap in some]
    return max([NEAR_TIE, *gaps])


@pytest.mark.parametrize("name", OURS)
def test_tokens_are_those_of_stock_up_to_near_ties(
    name: str, result: Callable[[str], Result]
) -> None:
    stock, ours = result(f"stock {OURS[name]}"), result(name)
    want, got = generated(stock), generated(ours)
    assert len(want) == len(got) == 32
    gaps = token_divergences(want, stock["batches"][0]["token_scores"], got)
    assert max(gaps, default=0.0) <= tied_within(result)
    differences = first_differences(want, got)
    agreeing = sum(differences.get(text, TOKENS) for text in range(32))
    assert agreeing > 0.5 * 32 * TOKENS


@pytest.mark.parametrize("name", [*(f"ours {model}" for model in MODELS), "eager"])
def test_scores_of_given_texts(name: str, result: Callable[[str], Result]) -> None:
    """Another token scores best only where stock's logits of both are nearly tied."""
    want, got = (result(which)["batches"][1]["scores"] for which in (f"stock {OURS[name]}", name))
    assert sum(len(text) for text in want) > 3000
    gaps = divergences(want, got)
    assert max(gaps, default=0.0) <= tied_within(result)
    between_stock = len(stock_gaps(OURS[name], result)[1])
    assert len(gaps) <= between_stock + 3 * math.sqrt(between_stock)  # their counts vary as much


def test_stock_backends_are_a_yardstick(result: Callable[[str], Result]) -> None:
    within = tied_within(result)
    print(f"FLASH_ATTN and TRITON_ATTN agree within {within} ulp")
    assert within <= LARGEST_TIE


def test_zeroed_attention_is_noticed(result: Callable[[str], Result]) -> None:
    """The comparisons above mean something only if a broken attention fails them."""
    stock, zeroed = result("stock fi-tiny"), result("zeroed")
    want, got = generated(stock), generated(zeroed)
    gaps = token_divergences(want, stock["batches"][0]["token_scores"], got)
    assert len(gaps) > 16
    scores = divergences(*(run["batches"][1]["scores"] for run in (stock, zeroed)))
    assert min(max(gaps), max(scores)) > LARGEST_TIE


@pytest.mark.parametrize("name", OURS)
def test_every_layer_is_ours_and_graphs_are_replayed(
    name: str, result: Callable[[str], Result]
) -> None:
    """Every step is planned; in steps that replay a graph no layer's Python code runs."""
    run = result(name)
    assert set(run["layers"]) == {"FIAttentionImpl"}
    layers, counters = len(run["layers"]), run["counters"]
    assert counters["layer_steps"] == layers * run["steps"]
    assert run["decode_steps"] >= TOKENS - 8
    in_python = {
        "eager": run["steps"],
        "all graphs": 0,
    }.get(name, run["steps"] - run["decode_steps"])
    assert counters["layer_calls"] == counters["attention_runs"] == layers * in_python


STOCK = {
    **{f"stock {model}": "FlashAttentionImpl" for model in MODELS},
    **{f"triton {model}": "TritonAttentionImpl" for model in MODELS},
}


@pytest.mark.parametrize("name", STOCK)
def test_stock_is_stock(name: str, result: Callable[[str], Result]) -> None:
    run = result(name)
    assert set(run["layers"]) == {STOCK[name]}
    assert set(run["counters"].values()) == {0}


@pytest.mark.parametrize("name", ["decode graphs", "all graphs"])
def test_our_kernels_run_inside_the_graphs(name: str, result: Callable[[str], Result]) -> None:
    run = result(name)
    kernels, steps = run["traced"]["kernels"], run["traced"]["steps"]

    def count(part: str) -> int:
        return sum(times for kernel, times in kernels.items() if part in kernel)

    # Decode steps launch the few-row kernel alone; others one kernel for all rows, and mixed graphs
    # that were captured for few rows an empty one for the rest.
    runs = len(run["layers"]) * steps
    assert count("few_rows_kernel") + count("mixed_rows_kernel") == runs > 0
    if name == "decode graphs":
        assert count("many_rows") == 0 < count("few_rows_kernel")
    # Where a step has enough requests, plans look for prefixes that they share.
    assert count("device_plan") + count("shared_plan") == steps
    assert not [kernel for kernel in kernels if "flash" in kernel.lower()]


def test_both_model_runners_served(result: Callable[[str], Result]) -> None:
    assert "gpu.model_runner" in result("decode graphs")["runner"]
    assert "gpu_model_runner" in result("ours fi-tiny")["runner"]
