"""vLLM on the CPU, bf16: teacher-forced logits against those of its own backend.

Free-running tokens cannot be compared in bf16: the stock engine disagrees with itself at another
batch size. So both score the same text, and a different best token is a divergence.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from e2e.conftest import Models
from e2e.harness import Batch, Result, Task, run_engines

pytestmark = pytest.mark.engine

MODELS = ("fi-tiny", "gemma2", "gptoss")
Scores = list[list[list[tuple[int, float]]]]


@pytest.fixture(scope="module")
def scored(
    models: Models, stock: dict[str, Result], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Result]:
    """Scores of the stock fp32 run's text: stock, stock at another batch size, ours."""
    tasks = []
    for model in MODELS:
        tokens = stock[model]["batches"][0]["tokens"]
        texts = [a + b for a, b in zip(models.prompts(model), tokens, strict=True)]
        batches = [Batch(texts, 1, prompt_logprobs=2)]
        for name, backend, engine in (
            ("stock", None, {}),
            ("alone", None, {"max_num_seqs": 1}),
            ("ours", "flashinfer", {}),
        ):
            folder = models.folder(model)
            task = Task(f"{model} {name}", folder, backend, batches, "bfloat16", engine)
            tasks.append(task)
    directory: Path = tmp_path_factory.mktemp("bf16")
    return run_engines(tasks, directory)


def _ulp(value: float) -> float:
    """Distance between bf16 numbers (8 bits of significand) at `value`."""
    return 2.0 ** (math.floor(math.log2(max(abs(value), 2.0**-126))) - 7)


def _divergences(want: Scores, got: Scores) -> list[float]:
    """For each position with another best token: how far `want` puts it from the best, in ulp."""
    gaps = []
    for positions, others in zip(want, got, strict=True):
        for candidates, other in zip(positions, others, strict=True):
            (best, top), chosen = candidates[0], other[0][0]
            if chosen != best:
                runner_up = dict(candidates).get(chosen, -math.inf)
                gaps.append((top - runner_up) / _ulp(top))
    return gaps


@pytest.mark.parametrize("model", MODELS)
def test_best_tokens_as_close_as_stock_to_itself(model: str, scored: dict[str, Result]) -> None:
    want, alone, got = (
        scored[f"{model} {name}"]["batches"][0]["scores"] for name in ("stock", "alone", "ours")
    )
    positions = sum(len(text) for text in want)
    assert positions > 32 * 256
    own, gaps = _divergences(want, alone), _divergences(want, got)
    print(f"{model}: {positions} positions, {len(own)} stock/stock, {len(gaps)} ours/stock")
    assert len(gaps) <= len(own)
    assert max(gaps, default=0.0) <= 2.0


@pytest.mark.parametrize("model", MODELS)
def test_scored_by_our_kernels(model: str, scored: dict[str, Result]) -> None:
    result = scored[f"{model} ours"]
    assert result["counters"]["attention_runs"] == len(result["layers"]) * result["steps"] > 0
