"""Parent side of the engine tests: describe tasks, run them in a child process, read results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "Batch",
    "Result",
    "Task",
    "assert_same_tokens",
    "end_in_order",
    "first_differences",
    "run_engines",
]

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 540
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads on a busy machine cost a factor of ten
    "TORCHDYNAMO_DISABLE": "1",  # vLLM compiles single activations even in eager mode: 10 s each
}


@dataclass(frozen=True)
class Batch:
    """Prompts that are handed to the engine together; max_tokens 0 asks for embeddings."""

    prompts: list[list[int]]
    max_tokens: int
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def describe(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Task:
    """One engine: a model, a backend, and the batches it gets. `backend` None asks for nothing.

    Batch `traced` runs last, and its GPU kernels are counted. `zero_attention`, `forget_prefixes`
    break ours on purpose: all of it, what requests share.
    """

    name: str
    model: Path
    backend: str | None
    batches: list[Batch]
    dtype: str = "float32"
    engine: dict[str, Any] = field(default_factory=dict)
    zero_attention: bool = False
    forget_prefixes: bool = False
    traced: Batch | None = None

    def describe(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in ("name", "backend", "dtype", "engine")},
            "model": str(self.model),
            "zero_attention": self.zero_attention,
            "forget_prefixes": self.forget_prefixes,
            "batches": [batch.describe() for batch in self.batches],
            "traced": None if self.traced is None else self.traced.describe(),
        }


Result = dict[str, Any]


def run_engines(
    tasks: Sequence[Task],
    directory: Path,
    *,
    environment: Mapping[str, str] | None = None,
    program: str = "e2e.engine",
    site: Path | None = None,
) -> dict[str, Result]:
    """Run each task in an engine of its own, all in one child process; results by task name.

    Args:
        tasks: what to run, in this order.
        directory: where the job, its result and the engines' output are written.
        environment: variables on top of ENVIRONMENT.
        program: module that the child runs.
        site: folder of packages that come before the installed ones.

    Raises:
        RuntimeError: the child failed; the message ends with its output's tail.
    """
    job, result, log = (directory / name for name in ("job.json", "result.json", "log.txt"))
    directory.mkdir(parents=True, exist_ok=True)
    job.write_text(json.dumps([task.describe() for task in tasks]))
    paths = (str(site or ""), str(ROOT), os.environ.get("PYTHONPATH", ""))
    path = os.pathsep.join(filter(None, paths))
    variables = {**os.environ, "PYTHONPATH": path, **ENVIRONMENT, **(environment or {})}
    with log.open("w") as output:
        child = subprocess.run(
            [sys.executable, "-m", program, str(job), str(result)],
            env=variables,
            cwd=directory,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    if child.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
        raise RuntimeError(f"engine process ended with {child.returncode}:\n{tail}")
    return json.loads(result.read_text())


def end_in_order() -> None:
    """Let SIGTERM end this process as an error does: what it has started is ended, too."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def first_differences(want: list[list[int]], got: list[list[int]]) -> dict[int, int]:
    """Return {prompt: position} of the first token that differs, for prompts that differ."""
    return {
        index: next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), -1)
        for index, (a, b) in enumerate(zip(want, got, strict=True))
        if a != b
    }


def assert_same_tokens(want: list[list[int]], got: list[list[int]]) -> None:
    """Fail unless every prompt has the same tokens."""
    differences = first_differences(want, got)
    assert not differences, (
        f"{len(differences)} of {len(want)} prompts differ; first at {{prompt: position}} "
        f"{dict(list(differences.items())[:8])}"
    )
