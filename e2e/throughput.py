"""Token throughput of a real engine with our backend and with its own, side by side.

    python -m e2e.throughput --engine vllm

Both engines of a pair run all the time and take the same batch in turn, so that they see the same
machine. A batch is the same work every time and other load only adds to it, so an engine's time is
its best; pairs start anew, because two processes of one engine differ by several percent. A row is
the median of the pairs. JSON goes to benchmarks/results/<machine>/e2e_vllm.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import REPOSITORY, commit, machine_name, results_path
from e2e.conftest import FI_TINY, fi_tiny_prompts
from e2e.harness import ENVIRONMENT
from e2e.shapes import make_model, random_prompts

BACKENDS = {"fi_backend": "flashinfer", "stock": None}


@dataclass(frozen=True)
class Workload:
    """`max_tokens` new tokens for each prompt of a model in one batch."""

    model: str
    dtype: str
    max_tokens: int

    @property
    def name(self) -> str:
        return f"{self.model} {self.dtype} 32 prompts x {self.max_tokens}"

    def prompts(self) -> list[list[int]]:
        if self.model == "fi-tiny":
            return fi_tiny_prompts()
        return random_prompts(32, shortest=8, longest=160)


def workloads() -> list[Workload]:
    """Return every workload of the run on this machine."""
    return [
        Workload(model, dtype, 256)
        for model in ("fi-tiny", "mistral", "gemma2")
        for dtype in ("float32", "bfloat16")
    ]


class Engine:
    """An engine in a process of its own, which stays up between batches."""

    def __init__(self, folder: Path, dtype: str, backend: str | None, log: Path) -> None:
        path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH", ""))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "e2e.throughput", "--serve"],
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )
        self._ask({"model": str(folder), "dtype": dtype, "backend": backend})

    def run(self, workload: Workload) -> dict[str, Any]:
        """Generate one batch; return its seconds, its tokens and our runs so far."""
        return self._ask({"prompts": workload.prompts(), "max_tokens": workload.max_tokens})

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                answer: dict[str, Any] = json.loads(line.removeprefix("ANSWER "))
                return answer
        raise RuntimeError(f"the engine process ended with {self._process.wait()}")


def serve() -> None:
    """Child process: build the engine that the first line describes, run a batch per line."""
    import vllm

    from e2e.engine import EXTENSION, run_batch

    task = json.loads(sys.stdin.readline())
    engine = vllm.LLM(
        model=task["model"],
        dtype=task["dtype"],
        attention_backend=task["backend"],
        skip_tokenizer_init=True,
        generation_config="vllm",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=32,
        enable_prefix_caching=False,
        worker_extension_cls=EXTENSION,
    )
    print("ANSWER {}", flush=True)
    for line in sys.stdin:
        result = run_batch(engine, json.loads(line))
        counters = engine.collective_rpc("fi_backend_counters")[0]
        answer = {key: result[key] for key in ("seconds", "tokens")}
        print("ANSWER", json.dumps({**answer, "counters": counters}), flush=True)


Answer = dict[str, Any]


def run_pair(folder: Path, workload: Workload, rounds: int, directory: Path) -> dict[str, Answer]:
    """Start both engines, run a workload in them in turn, return the best answer of each."""
    engines = {
        name: Engine(folder, workload.dtype, backend, directory / f"{name}.log")
        for name, backend in BACKENDS.items()
    }
    try:
        results: dict[str, list[Answer]] = {name: [] for name in engines}
        for _ in range(rounds + 1):
            for name, engine in engines.items():
                results[name].append(engine.run(workload))
    finally:
        for engine in engines.values():
            engine.close()
    if not results["fi_backend"][-1]["counters"]["attention_runs"]:
        raise RuntimeError("our kernels have not served the engine that asked for them")
    if results["stock"][-1]["counters"]["attention_runs"]:
        raise RuntimeError("our kernels have served the stock engine")
    return {
        name: min(answers[1:], key=lambda answer: float(answer["seconds"]))
        for name, answers in results.items()
    }


def measure(workload: Workload, pairs: int, rounds: int, directory: Path) -> list[dict[str, Any]]:
    """Run a workload in `pairs` pairs of engines; return a row for each backend."""
    folder = FI_TINY if workload.model == "fi-tiny" else make_model(workload.model, directory)
    results: dict[str, list[Answer]] = {name: [] for name in BACKENDS}
    for _ in range(pairs):
        for name, answer in run_pair(folder, workload, rounds, directory).items():
            results[name].append(answer)
    ours, stock = ([answer["seconds"] for answer in results[name]] for name in BACKENDS)
    ratio = statistics.median(b / a for a, b in zip(ours, stock, strict=True))
    rows = []
    for name, answers in results.items():
        seconds = statistics.median(answer["seconds"] for answer in answers)
        tokens = sum(len(one) for one in answers[-1]["tokens"])
        rows.append(
            {
                "cell": workload.name,
                "backend": name,
                "us": seconds * 1e6,
                "out_tps": tokens / seconds,
                "tps_over_stock": ratio if name == "fi_backend" else 1.0,
            }
        )
    same = results["fi_backend"][-1]["tokens"] == results["stock"][-1]["tokens"]
    print(
        f"{workload.name:40} {rows[0]['out_tps']:8.0f} {rows[1]['out_tps']:8.0f} tok/s  "
        f"{ratio:5.3f}x  {'same tokens' if same else 'other tokens'}",
        flush=True,
    )
    return rows


def main() -> None:
    """Parse the command line, run the workloads, record the rows."""
    parser = argparse.ArgumentParser(prog="python -m e2e.throughput", description=__doc__)
    parser.add_argument("--engine", choices=("vllm",), default="vllm")
    parser.add_argument("--workloads", default="", help="only those whose name contains this text")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of engines")
    parser.add_argument("--rounds", type=int, default=5, help="batches for each engine of a pair")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    print(f"vLLM on {machine_name()}: ours, stock, ours / stock", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for workload in workloads():
            if arguments.workloads in workload.name:
                rows += measure(workload, arguments.pairs, arguments.rounds, Path(directory))
    if not arguments.no_write:
        conditions = {
            "routine": "e2e_vllm",
            "gpu": machine_name(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "commit": commit(),
        }
        path = results_path("e2e_vllm")
        path.write_text(json.dumps([{**row, **conditions} for row in rows], indent=1) + "\n")
        print("wrote", path)


if __name__ == "__main__":
    main()
