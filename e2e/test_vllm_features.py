"""vLLM on the CPU: features of the engine that no other module has, on our kernels.

In fp32 tokens equal the stock backend's. A cache in fp8 is judged by how far it moves the logits of
given texts, against how far it moves the stock backend's.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from e2e.conftest import FI_TINY, Models, fi_tiny_prompts
from e2e.harness import Batch, Result, Task, assert_same_tokens, run_engines
from e2e.shapes import random_prompts

pytestmark = pytest.mark.engine

TOKENS = 48
# Engine arguments; the model is fi-tiny.
SAME_TOKENS: dict[str, dict[str, Any]] = {
    "pages of 48 tokens": {"block_size": 48},
    "pages of 528 tokens": {"block_size": 528},
    "drafts from a model": {
        "speculative_config": {
            "method": "draft_model",
            "model": str(FI_TINY),
            "num_speculative_tokens": 3,
            "attention_backend": "flashinfer",
        }
    },
}
FROM_PROMPT: dict[str, Any] = {
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
    }
}
FP8 = ("fp8_e4m3", "fp8_e5m2")
HYBRID_OFF = {"disable_hybrid_kv_cache_manager": True}
STORED = ("cache to storage", "cache from storage")


def _stored_engine(folder: Path) -> dict[str, Any]:
    return {
        "block_size": 32,
        "kv_transfer_config": {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(folder)},
        },
    }


@pytest.fixture(scope="module")
def results(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    directory = tmp_path_factory.mktemp("features")
    prompts = fi_tiny_prompts()
    batches = [Batch(prompts[:8], TOKENS)]
    texts = [Batch(prompts, 1, prompt_logprobs=5)]

    def task(name: str, backend: str | None, engine: dict[str, Any], of: list[Batch]) -> Task:
        return Task(name, FI_TINY, backend, of, engine=engine)

    tasks = [
        task("stock", None, {}, batches + texts),
        *(task(name, "flashinfer", engine, batches) for name, engine in SAME_TOKENS.items()),
        *(task(name, "custom", _stored_engine(directory / "kv"), batches) for name in STORED),
    ]
    for dtype in FP8:
        engine = {"kv_cache_dtype": dtype}
        tasks += [
            task(f"stock {dtype}", None, engine, texts),
            task(dtype, "flashinfer", engine, texts),
        ]
    mixed = [Batch(random_prompts(8, shortest=8, longest=160), TOKENS)]
    for name, backend in (("stock mixed windows", None), ("mixed windows", "flashinfer")):
        tasks.append(Task(name, models.folder("gemma3"), backend, mixed, engine=HYBRID_OFF))
    encoder = models.folder("bert")
    for file in FI_TINY.glob("tokenizer*.json"):  # vLLM does not embed without one
        shutil.copy(file, encoder)
    embedded = [Batch([[t % 250 + 3 for t in p] for p in mixed[0].prompts], 0)]
    options = {"runner": "pooling", "skip_tokenizer_init": False, "max_model_len": 512}
    for name, backend in (("stock encoder", None), ("encoder", "flashinfer")):
        tasks.append(Task(name, encoder, backend, embedded, engine=options))
    # The last: vLLM cannot start another engine in a process where this one was.
    tasks.append(task("drafts from the prompt", "flashinfer", FROM_PROMPT, batches))
    return run_engines(tasks, directory)


def assert_ours(result: Result) -> None:
    assert set(result["layers"]) == {"FIAttentionImpl"}
    assert result["counters"]["attention_runs"] == result["counters"]["layer_calls"] > 0


@pytest.mark.parametrize("name", [*SAME_TOKENS, *STORED, "drafts from the prompt"])
def test_tokens_equal_stock(name: str, results: dict[str, Result]) -> None:
    assert_ours(results[name])
    want, got = (results[run]["batches"][0]["tokens"] for run in ("stock", name))
    assert_same_tokens(want, got)


@pytest.mark.parametrize("name", ["drafts from the prompt", "drafts from a model"])
def test_drafts_save_steps(name: str, results: dict[str, Result]) -> None:
    assert results[name]["steps"] < results["stock"]["steps"]


def test_the_draft_model_runs_on_our_kernels_too(results: dict[str, Result]) -> None:
    result = results["drafts from a model"]
    target_layers = len(results["pages of 48 tokens"]["layers"])
    assert result["counters"]["attention_runs"] > target_layers * result["steps"]


def test_a_stored_cache_is_read_back(results: dict[str, Result]) -> None:
    """The second engine computes little of what the first has left on disk."""
    first, second = (results[name]["largest_step"] for name in STORED)
    assert second < first / 2


def _mean_change(result: Result, stock: Result) -> float:
    """How far the logits that `stock` puts first lie from its own, on average."""
    changes = [
        abs(dict(other)[best[0][0]] - best[0][1])
        for text, others in zip(stock, result, strict=True)
        for best, other in zip(text, others, strict=True)
        if best[0][0] in dict(other)
    ]
    return sum(changes) / len(changes)


@pytest.mark.parametrize("dtype", FP8)
def test_an_fp8_cache_moves_logits_no_more_than_the_stock_one(
    dtype: str, results: dict[str, Result]
) -> None:
    assert_ours(results[dtype])
    exact = results["stock"]["batches"][1]["scores"]
    ours, stock = (
        _mean_change(results[name]["batches"][0]["scores"], exact)
        for name in (dtype, f"stock {dtype}")
    )
    assert 0 < ours < 1.1 * stock


def test_windowed_and_full_layers_in_one_group(results: dict[str, Result]) -> None:
    """Without the hybrid cache manager all layers of a model have one block table."""
    want, got = (results[name] for name in ("stock mixed windows", "mixed windows"))
    assert_ours(got)
    assert got["counters"]["group_steps"] == got["steps"]
    assert_same_tokens(want["batches"][0]["tokens"], got["batches"][0]["tokens"])


def test_embeddings_of_an_encoder(results: dict[str, Result]) -> None:
    assert_ours(results["encoder"])
    want, got = (
        torch.tensor(results[name]["batches"][0]["embeddings"])
        for name in ("stock encoder", "encoder")
    )
    assert want.std() > 0.05
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
