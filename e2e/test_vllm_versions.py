"""Our one plugin in other vLLM versions, on the CPU: the tokens of the installed stock engine.

Fetch the versions with `scripts/fetch_vllm_versions.sh DIRECTORY`, then run this with
FI_BACKEND_E2E_VLLM_SITES=DIRECTORY.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from e2e.conftest import SQUEEZED, Models
from e2e.harness import Batch, Result, Task, assert_same_tokens, run_engines

pytestmark = pytest.mark.engine

VARIABLE = "FI_BACKEND_E2E_VLLM_SITES"
VERSIONS = ("0.25.1", "0.33.0")
MODELS = ("fi-tiny", "mistral")  # the others need more of the compiled extension
TOKENS = 64


@pytest.fixture(params=VERSIONS, scope="module")
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def results(
    version: str, models: Models, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Result]:
    sites = os.environ.get(VARIABLE)
    if not sites:
        pytest.skip(f"{VARIABLE} is not set; see scripts/fetch_vllm_versions.sh")
    site = Path(sites) / version
    if not (site / "vllm").is_dir():
        pytest.skip(f"vLLM {version} is not in {site}; run scripts/fetch_vllm_versions.sh {sites}")
    no_compiled_operators = {"compilation_config": {"custom_ops": ["none"]}}
    tasks = [
        Task(
            name,
            models.folder(name),
            "flashinfer",
            [Batch(models.prompts(name), TOKENS)],
            engine=no_compiled_operators,
        )
        for name in MODELS
    ]
    squeezed = {**SQUEEZED, **no_compiled_operators}
    folder, batches = models.folder("fi-tiny"), models.squeezed_batches()
    tasks.append(Task("fi-tiny squeezed", folder, "custom", batches, engine=squeezed))
    return run_engines(
        tasks,
        tmp_path_factory.mktemp(version),
        environment={"VLLM_TARGET_DEVICE": "cpu"},
        program="e2e.engine_without_extension",
        site=site,
    )


@pytest.mark.parametrize("model", MODELS)
def test_tokens_equal_installed_stock_engine(
    model: str, version: str, results: dict[str, Result], stock: dict[str, Result]
) -> None:
    result = results[model]
    assert result["version"].split("+")[0] == version
    assert set(result["layers"]) == {"FIAttentionImpl"}
    assert result["counters"]["attention_runs"] == len(result["layers"]) * result["steps"] > 0
    want = [tokens[:TOKENS] for tokens in stock[model]["batches"][0]["tokens"]]
    assert_same_tokens(want, result["batches"][0]["tokens"])


def test_chunked_prefill_prefix_reuse_and_preemption(
    results: dict[str, Result], stock: dict[str, Result]
) -> None:
    want, got = (run["fi-tiny squeezed"] for run in (stock, results))
    assert got["preemptions"] > 0
    assert sum(got["batches"][1]["cached_tokens"]) > 0
    for first, second in zip(want["batches"], got["batches"], strict=True):
        assert_same_tokens(first["tokens"], second["tokens"])
