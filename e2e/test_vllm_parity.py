"""vLLM on the CPU, fp32: greedy tokens equal to those of its own backend, proven to be ours."""

from __future__ import annotations

import pytest

from e2e.conftest import MODELS, SQUEEZED_MODELS, TOKENS
from e2e.harness import Result, assert_same_tokens

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("model", MODELS)
def test_greedy_tokens_equal_stock(
    model: str, stock: dict[str, Result], ours: dict[str, Result]
) -> None:
    want, got = (run[model]["batches"][0]["tokens"] for run in (stock, ours))
    assert len(want) == 32
    assert all(len(tokens) == TOKENS for tokens in want)
    assert_same_tokens(want, got)


@pytest.mark.parametrize("model", MODELS)
def test_zeroed_attention_is_noticed(
    model: str, stock: dict[str, Result], ours: dict[str, Result]
) -> None:
    """The comparison above means something only if a broken attention fails it."""
    got = ours[f"{model} zeroed"]["batches"][0]["tokens"]
    want = [tokens[: len(got[0])] for tokens in stock[model]["batches"][0]["tokens"]]
    with pytest.raises(AssertionError, match="prompts differ"):
        assert_same_tokens(want, got)
    agreeing = sum(
        x == y for a, b in zip(want, got, strict=True) for x, y in zip(a, b, strict=True)
    )
    assert agreeing < 0.25 * sum(len(tokens) for tokens in got)


@pytest.mark.parametrize("model", MODELS)
def test_every_layer_and_step_ran_on_our_kernels(model: str, ours: dict[str, Result]) -> None:
    result = ours[model]
    assert set(result["layers"]) == {"FIAttentionImpl"}
    runs = len(result["layers"]) * result["steps"]
    assert result["counters"]["attention_runs"] == runs > 0
    assert result["counters"]["layer_steps"] == runs


@pytest.mark.parametrize("model", MODELS)
def test_unasked_engine_is_stock(model: str, stock: dict[str, Result]) -> None:
    result = stock[model]
    assert set(result["layers"]) == {"CPUAttentionBackendImpl"}
    assert set(result["counters"].values()) == {0}


@pytest.mark.parametrize("model", SQUEEZED_MODELS)
def test_chunked_prefill_prefix_reuse_and_preemption(
    model: str, stock: dict[str, Result], ours: dict[str, Result]
) -> None:
    want, got = (run[f"{model} squeezed"] for run in (stock, ours))
    assert got["preemptions"] > 0
    assert got["mixed_steps"] > 0
    assert got["largest_step"] <= 96
    assert sum(got["batches"][1]["cached_tokens"]) > 0
    assert got["steps"] == want["steps"]
    for first, second in zip(want["batches"], got["batches"], strict=True):
        assert first["cached_tokens"] == second["cached_tokens"]
        assert_same_tokens(first["tokens"], second["tokens"])
