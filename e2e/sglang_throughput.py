"""Token throughput of a real SGLang with our backend and with its own.

    python -m e2e.sglang_throughput

The workloads are those of e2e.throughput. Engines start one after the other, in another order each
time; of an engine's rounds the best counts, since other load only adds to them, and a row is the
median of the starts. JSON goes to benchmarks/results/<machine>/e2e_sglang.json.

On a GPU the models are dummy weights, the peers fa3, triton and SGLang's own flashinfer:

    python -m e2e.sglang_throughput --workloads "1B bf16 very long" --backends fa3 --starts 1
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import commit, machine_name, results_path
from e2e import workloads
from e2e.harness import Batch, Result, Task, run_engines
from e2e.sglang_site import CPU_ENVIRONMENT, sglang_path
from e2e.workloads import Model, Workload

OURS = "fi_backend"
CPU_ENGINE = {
    "device": "cpu",
    "max_total_tokens": 32768,
    "max_running_requests": 32,
    "disable_overlap_schedule": True,
    "disable_cuda_graph": True,
}
GPU_ENGINE = {
    "load_format": "dummy",
    "context_length": 16384,
    "mem_fraction_static": 0.85,
    "max_running_requests": 256,
    "chunked_prefill_size": 8192,
    "cuda_graph_max_bs_decode": 256,
}


@dataclass(frozen=True)
class Round(Batch):
    """A batch whose requests have an output length each."""

    max_tokens: list[int]  # type: ignore[assignment]


def peers(wanted: Sequence[str]) -> list[str]:
    """Return SGLang's own backends to compare with, those in `wanted` if it names any."""
    known = ["fa3", "triton", "flashinfer"] if torch.cuda.is_available() else ["torch_native"]
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise SystemExit(f"--backends must be of {', '.join(known)}; got {', '.join(unknown)}")
    return [name for name in known if not wanted or name in wanted]


def engine_arguments(model: Model, page_size: int) -> dict[str, Any]:
    """Arguments of SGLang's Engine that mean what the model's mean to vLLM."""
    caches = {"auto": "auto", "fp8": "fp8_e4m3"}
    common = {
        "page_size": page_size,
        "disable_radix_cache": not model.engine.get("enable_prefix_caching", False),
        "kv_cache_dtype": caches[model.engine.get("kv_cache_dtype", "auto")],
    }
    return {**(GPU_ENGINE if torch.cuda.is_available() else CPU_ENGINE), **common}


def batches(workload: Workload, rounds: int) -> list[Batch]:
    """Some short requests to warm up, then each round after what it finds in the cache."""
    few = workload.requests(-1)[:4]
    found: list[Batch] = [Batch([prompt for prompt, _ in few], 8)]
    for number in range(rounds):
        if workload.prefix is not None:
            found.append(Batch([workload.prefix(number)], 1))
        requests = workload.requests(number)
        found.append(Round([prompt for prompt, _ in requests], [most for _, most in requests]))
    return found


def run(workload: Workload, backend: str, arguments: argparse.Namespace, directory: Path) -> Result:
    """Start an engine, run the workload's rounds; return the first, in the best time of all."""
    on_gpu = torch.cuda.is_available()
    environment = {"PYTHONPATH": sglang_path(), **({} if on_gpu else CPU_ENVIRONMENT)}
    if backend == "flashinfer":
        environment["FI_BACKEND_KEEP_FLASHINFER"] = "1"
    todo = batches(workload, arguments.rounds)
    task = Task(
        backend,
        workload.model.folder(directory),
        backend,
        todo,
        dtype=workload.model.dtype,
        engine=engine_arguments(workload.model, arguments.page_size),
    )
    result = run_engines(
        [task], directory / backend, environment=environment, program="e2e.sglang_engine"
    )[backend]
    pairs = zip(todo, result["batches"], strict=True)
    answers = [answer for batch, answer in pairs if isinstance(batch, Round)]
    seconds = [answer["seconds"] for answer in answers]
    print(f"  {backend}: {', '.join(f'{second:.2f}' for second in seconds)} s", flush=True)
    return {"seconds": min(seconds), "tokens": answers[0]["tokens"]}


def measure(
    workload: Workload, contenders: Sequence[str], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Start every engine so many times, print a line, return a row for each backend."""
    results: dict[str, list[Result]] = {name: [] for name in contenders}
    orders = itertools.cycle([contenders, contenders[::-1]])
    for order in itertools.islice(orders, arguments.starts):
        with tempfile.TemporaryDirectory() as directory:
            for name in order:
                results[name].append(run(workload, name, arguments, Path(directory)))
    seconds = {
        name: statistics.median(result["seconds"] for result in of_backend)
        for name, of_backend in results.items()
    }
    best = min(seconds[name] for name in contenders if name != OURS)
    mine = results[OURS][-1]["tokens"]
    count = sum(map(len, mine))
    rows = [
        {
            "cell": f"{workload.name}, page {arguments.page_size}",
            "backend": name,
            "us": seconds[name] * 1e6,
            "out_tps": count / seconds[name],
            "tps_over_stock": best / seconds[name] if name == OURS else 1.0,
        }
        for name in contenders
    ]
    speeds = "  ".join(f"{row['backend']} {row['out_tps']:.0f}" for row in rows)
    same = [
        sum(a == b for a, b in zip(mine, results[name][-1]["tokens"], strict=True))
        for name in contenders[1:]
    ]
    print(
        f"{rows[0]['cell']:60} {speeds} tok/s  {best / seconds[OURS]:5.3f}x  "
        f"same tokens in {', '.join(map(str, same))} of {len(mine)} texts",
        flush=True,
    )
    return rows


def main() -> None:
    """Parse the command line, run the workloads, record the rows."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m e2e.sglang_throughput", description=__doc__)
    parser.add_argument(
        "--workloads", nargs="+", default=[""], help="only those whose name has one of these texts"
    )
    parser.add_argument("--backends", default="", help="only these peers, with commas between")
    parser.add_argument("--page-size", type=int, default=1, help="tokens of a page of the cache")
    parser.add_argument("--starts", type=int, default=2, help="starts of every engine")
    parser.add_argument("--rounds", type=int, default=2 if on_gpu else 3, help="batches a start")
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/...")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    contenders = [OURS, *peers([name for name in arguments.backends.split(",") if name])]
    every = workloads.GPU if on_gpu else workloads.CPU
    chosen = [each for each in every if any(text in each.name for text in arguments.workloads)]
    print(f"SGLang on {machine_name()}; ratio: ours over the best peer", flush=True)
    rows = [row for workload in chosen for row in measure(workload, contenders, arguments)]
    if not arguments.no_write:
        conditions = {
            "routine": "e2e_sglang",
            "gpu": machine_name(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "commit": commit(),
        }
        path = arguments.output or results_path("e2e_sglang")
        path.write_text(json.dumps([{**row, **conditions} for row in rows], indent=1) + "\n")
        print("wrote", path)


if __name__ == "__main__":
    main()
