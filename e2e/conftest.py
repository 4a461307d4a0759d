"""Engine runs that several test modules read. Each starts when the first test asks for it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from e2e.harness import ROOT, Batch, Result, Task, run_engines
from e2e.shapes import SHAPES, make_model, random_prompts

FI_TINY = ROOT / "models" / "fi-tiny"
MODELS = ("fi-tiny", *SHAPES)
# The ways to name us, spread over the models.
NAMES = ("flashinfer", "FlashInfer", "custom", "FLASHINFER", "CUSTOM")
TOKENS = 256
ZEROED_TOKENS = 32
# Few pages, few tokens a step and a shared prefix: chunked prefill, mixed steps, reuse, preemption.
SQUEEZED = {
    "block_size": 32,
    "num_gpu_blocks_override": 64,
    "max_num_batched_tokens": 96,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
}
SQUEEZED_MODELS = ("fi-tiny", "gemma2", "gemma3n")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is not None:
        return
    skip = pytest.mark.skip(reason="vllm is not installed")
    for item in items:
        if "engine" in item.keywords:
            item.add_marker(skip)


def fi_tiny_prompts() -> list[list[int]]:
    """The 32 prompts of our trained model as tokens: <|bos|>, then each byte plus 3."""
    texts: list[str] = json.loads((FI_TINY / "prompts.json").read_text())
    return [[1, *(byte + 3 for byte in text.encode())] for text in texts]


class Models:
    """Model folders and their prompts, by name."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def folder(self, name: str) -> Path:
        return FI_TINY if name == "fi-tiny" else make_model(name, self._directory)

    def prompts(self, name: str) -> list[list[int]]:
        if name == "fi-tiny":
            return fi_tiny_prompts()
        return random_prompts(32, shortest=8, longest=160)

    def squeezed_batches(self) -> list[Batch]:
        """A long shared prefix with different endings, then half of it again from the cache."""
        shared = random_prompts(1, shortest=150, longest=150, seed=1)[0]
        shared = [token % 250 + 3 for token in shared]
        endings = [[t % 250 + 3 for t in p] for p in random_prompts(24, shortest=1, longest=60)]
        prompts = [shared + ending for ending in endings]
        return [Batch(prompts, 64), Batch(prompts[::2], 16)]

    def tasks(self, backend: str | None) -> list[Task]:
        """The parity run of every model; `backend` "ours" names us in turn in every way."""
        tasks = []
        for index, name in enumerate(MODELS):
            chosen = NAMES[index % len(NAMES)] if backend == "ours" else backend
            batches = [Batch(self.prompts(name), TOKENS)]
            tasks.append(Task(name, self.folder(name), chosen, batches))
        squeezed = self.squeezed_batches()
        chosen = "flashinfer" if backend == "ours" else backend
        for name in SQUEEZED_MODELS:
            task = Task(f"{name} squeezed", self.folder(name), chosen, squeezed, engine=SQUEEZED)
            tasks.append(task)
        return tasks

    def zeroed_tasks(self) -> list[Task]:
        """As `tasks`, with an attention that returns zeros."""
        return [
            Task(
                f"{name} zeroed",
                self.folder(name),
                "flashinfer",
                [Batch(self.prompts(name), ZEROED_TOKENS)],
                zero_attention=True,
            )
            for name in MODELS
        ]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def stock(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Engines that were asked for nothing; our package is installed all the same."""
    return run_engines(models.tasks(None), tmp_path_factory.mktemp("stock"))


@pytest.fixture(scope="session")
def ours(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """The same engines, asked for us by name; then some with an attention broken on purpose."""
    tasks = models.tasks("ours") + models.zeroed_tasks()
    return run_engines(tasks, tmp_path_factory.mktemp("ours"))
