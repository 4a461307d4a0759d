"""A real SGLang on the CPU: the tokens of its torch_native backend, from ours, under both names."""

from __future__ import annotations

import pytest

from e2e.conftest import FI_TINY, Models, fi_tiny_prompts
from e2e.harness import Batch, Result, Task, assert_same_tokens, run_engines
from e2e.sglang_site import CPU_ARGUMENTS, CPU_ENVIRONMENT, sglang_path

pytestmark = pytest.mark.engine

ENGINE = {
    **CPU_ARGUMENTS,
    "page_size": 1,
    "max_running_requests": 32,
    "mem_fraction_static": 0.3,
}
ROOMY = {**ENGINE, "max_total_tokens": 16384}
# Little room and few tokens a step: chunked prefill, mixed steps, reuse.
SQUEEZED = {
    **ENGINE,
    "max_total_tokens": 1024,
    "chunked_prefill_size": 64,
    "enable_mixed_chunk": True,
}
NAMES = ("torch_native", "fi_backend", "flashinfer")
TOKENS = 64


@pytest.fixture(scope="module")
def results(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    try:
        path = sglang_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    batches = [Batch(fi_tiny_prompts(), TOKENS)]
    squeezed = models.squeezed_batches()
    tasks = [Task(name, FI_TINY, name, batches, engine=ROOMY) for name in NAMES]
    tasks += [
        Task(f"{name} squeezed", FI_TINY, name, squeezed, engine=SQUEEZED) for name in NAMES[:2]
    ]
    directory = tmp_path_factory.mktemp("sglang")
    found = run_engines(
        tasks,
        directory,
        environment={**CPU_ENVIRONMENT, "PYTHONPATH": path},
        program="e2e.sglang_engine",
    )
    found["log"] = {"text": (directory / "log.txt").read_text(errors="replace")}
    return found


@pytest.mark.parametrize("name", NAMES[1:])
def test_tokens_equal_torch_native(name: str, results: dict[str, Result]) -> None:
    assert results[name]["backend"] == name
    want = results["torch_native"]["batches"][0]["tokens"]
    assert len({tuple(tokens) for tokens in want}) > 10
    assert_same_tokens(want, results[name]["batches"][0]["tokens"])


def test_chunks_mixed_steps_and_reuse(results: dict[str, Result]) -> None:
    want, got = results["torch_native squeezed"], results["fi_backend squeezed"]
    assert sum(got["batches"][1]["cached_tokens"]) > 0
    for first, second in zip(want["batches"], got["batches"], strict=True):
        assert_same_tokens(first["tokens"], second["tokens"])


def test_our_backend_says_that_it_serves(results: dict[str, Result]) -> None:
    """Once for each engine that asked for us, and not for torch_native."""
    lines = results["log"]["text"].splitlines()
    assert sum("serves attention on cpu" in line for line in lines) == 3
