"""An engine in a process of its own that stays up, and takes one batch after the other.

Parent and child speak JSON, a line for each request and each answer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import REPOSITORY
from e2e import workloads
from e2e.harness import ENVIRONMENT
from e2e.workloads import Workload

__all__ = [
    "SAMPLER",
    "Answer",
    "Batch",
    "Child",
    "Engine",
    "answer_batches",
    "serve",
    "without_compiling",
]

Answer = dict[str, Any]
Batch = dict[str, Any]  # prompts, and max_tokens of all or of each
SAMPLER = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}  # it would be compiled for a minute
# What an engine that does not compile captures: steps of decodes, from the model as it is.
_WITHOUT_COMPILING = {
    "mode": 0,
    "cudagraph_mode": "FULL_DECODE_ONLY",
    "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256],
}


def without_compiling(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of an engine that does not compile the model; eager ones as they are."""
    if arguments.get("enforce_eager"):
        return arguments
    return {**arguments, "compilation_config": _WITHOUT_COMPILING}


class Child:
    """A process that answers requests, a line each; the parent's side.

    Args:
        program: module that it runs, and its arguments.
        engine: what it is told first: the engine to make.
        log: file for what it prints.
        variables: its environment.
    """

    def __init__(
        self,
        program: Sequence[str],
        engine: dict[str, Any],
        log: Path,
        variables: Mapping[str, str],
    ) -> None:
        path = os.pathsep.join(filter(None, (str(REPOSITORY), variables.get("PYTHONPATH", ""))))
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, "-m", *program],
            env={**variables, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )
        self._send(engine)

    def wait(self) -> None:
        """Wait until the engine is ready.

        Raises:
            RuntimeError: it has ended instead, as in all methods; the message is its log's tail.
        """
        self._answer()

    def warm_up(self, workload: Workload) -> None:
        """Run a small batch for the model of this workload."""
        self.run(workload, -1, "small")

    def run(self, workload: Workload, number: int, kind: str = "whole") -> Answer:
        """Run a round; return its `seconds`, its `tokens`, and our `counters` so far.

        Args:
            workload: whose round.
            number: of the round.
            kind: "whole"; "small", a few short requests; "traced", whole and watched: the answer
                has the `trace` of step_trace.StepTrace, too.
        """
        self._send({"workload": workload.name, "round": number, "kind": kind})
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> Answer:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                answer: Answer = json.loads(line.removeprefix("ANSWER "))
                return answer
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"the engine process ended with {self._process.wait()}:\n{tail}")


class Engine(Child):
    """vLLM.

    Args:
        folder: the model's.
        dtype: of weights and activations.
        backend: as a user asks for it; None asks for nothing.
        arguments: more arguments of vllm.LLM.
        log: file for what the engine prints.
        environment: more variables of the process.
        compiles: use torch.compile; where steps are eager, nothing is compiled anyway.
    """

    def __init__(
        self,
        folder: Path,
        dtype: str,
        backend: str | None,
        arguments: dict[str, Any],
        log: Path,
        environment: dict[str, str],
        *,
        compiles: bool,
    ) -> None:
        variables = {**os.environ, **ENVIRONMENT, **SAMPLER, **environment}
        if compiles:
            del variables["TORCHDYNAMO_DISABLE"]
        else:
            arguments = without_compiling(arguments)
        task = {"model": str(folder), "dtype": dtype, "attention_backend": backend, **arguments}
        super().__init__(["e2e.throughput", "--serve"], task, log, variables)


def answer_batches(requests: Iterable[str], run: Callable[[Batch, str], Answer]) -> None:
    """Child process: say that the engine is ready, then run a batch for each line.

    Args:
        requests: lines of Child.run().
        run: takes a batch and its kind, and returns the answer; what comes before a batch, to fill
            the cache with its prefixes, is of the kind "prefix".
    """
    print("ANSWER {}", flush=True)
    for line in requests:
        request = json.loads(line)
        workload, number = workloads.find(request["workload"]), request["round"]
        batch = workload.requests(number)
        if request["kind"] == "small":
            batch = [(prompt[:128], 16) for prompt, _ in batch[:8]]
        elif workload.prefixes is not None:
            for prefix in workload.prefixes(number):  # together, each would compute all of its own
                run({"prompts": [prefix], "max_tokens": 1}, "prefix")
        prompts, lengths = ([request[i] for request in batch] for i in (0, 1))
        answer = run({"prompts": prompts, "max_tokens": lengths}, request["kind"])
        print("ANSWER", json.dumps(answer), flush=True)


def serve(requests: Iterable[str]) -> None:
    """Child process: build the engine that the first line describes, run a batch per line."""
    import vllm

    from e2e.engine import EXTENSION, builders_of, run_batch, runner_of
    from e2e.memory import our_bytes
    from e2e.step_trace import StepTrace

    lines = iter(requests)
    engine = vllm.LLM(
        skip_tokenizer_init=True,
        generation_config="vllm",
        worker_extension_cls=EXTENSION,
        **json.loads(next(lines)),
    )

    def run(batch: Batch, kind: str) -> Answer:
        trace = StepTrace(engine) if kind == "traced" else None
        result = run_batch(engine, batch)
        answer = {key: result[key] for key in ("seconds", "tokens")}
        answer["counters"] = engine.collective_rpc("fi_backend_counters")[0]
        answer["builder_bytes"] = our_bytes(builders_of(runner_of(engine)))
        if trace is not None:
            answer["trace"] = trace.summary()
        return answer

    answer_batches(lines, run)
