"""SGLang in a process of its own that stays up, and takes one batch after the other.

    python -m e2e.sglang_served

It speaks the protocol of e2e.served: the first line describes the engine, each later one a batch.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from e2e.harness import ENVIRONMENT
from e2e.served import Answer, Child, answer_batches
from e2e.sglang_site import CPU_ENVIRONMENT, sglang_path
from e2e.workloads import Workload

__all__ = ["SGLang", "engine_environment", "serve"]

# What our factory logs in the scheduler's process when it makes a backend.
_SERVES = "serves attention on"


def engine_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a process that runs SGLang, with some of its own."""
    variables = {**os.environ, **ENVIRONMENT, "PYTHONPATH": sglang_path()}
    if torch.cuda.is_available():
        del variables["TORCHDYNAMO_DISABLE"]
    else:
        variables |= CPU_ENVIRONMENT
    return variables | environment


class SGLang(Child):
    """The parent's side.

    Args:
        folder: the model's.
        dtype: of weights and activations.
        backend: the attention backend's name.
        arguments: more arguments of SGLang's Engine.
        log: file for what the engine prints.
        environment: more variables of the process.
    """

    def __init__(
        self,
        folder: Path,
        dtype: str,
        backend: str,
        arguments: Mapping[str, Any],
        log: Path,
        environment: Mapping[str, str],
    ) -> None:
        engine = {
            "model_path": str(folder),
            "dtype": dtype,
            "attention_backend": backend,
            **arguments,
        }
        super().__init__(["e2e.sglang_served"], engine, log, engine_environment(environment))

    def run(self, workload: Workload, number: int, kind: str = "whole") -> Answer:
        """As Child.run(). No call reaches SGLang's scheduler, so its log says who serves."""
        answer = super().run(workload, number, kind)
        runs = self._log.read_text(errors="replace").count(_SERVES)
        return {**answer, "counters": {"attention_runs": runs}}


def serve(requests: Iterable[str]) -> None:
    """Child process: build the engine that the first line describes, run a batch per line."""
    from sglang.srt.entrypoints.engine import Engine

    from e2e.sglang_engine import generate

    lines = iter(requests)
    fixed = {"skip_tokenizer_init": True, "sampling_backend": "pytorch", "random_seed": 0}
    engine = Engine(**fixed, log_level="info", **json.loads(next(lines)))
    answer_batches(lines, lambda batch, _: generate(engine, batch))
    engine.shutdown()


if __name__ == "__main__":
    serve(sys.stdin)
