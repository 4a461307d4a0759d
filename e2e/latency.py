"""Latency of served requests under Poisson arrivals, with our backend and with the engine's own.

    python -m e2e.latency --loads 0.5 0.9
    python -m e2e.latency --engine sglang --page-size 64

The servers of all backends run all the time and are loaded in turn, with the same requests at the
same times. The peak is what the best stock backend serves if all requests come at once; a load is a
part of that. A row has the median and the 99th percentile of the time to the first token (TTFT) and
of the time for each later one (TPOT), and the requests that were served a second. JSON goes to
benchmarks/results/<machine>/e2e_<engine>_latency.json, after each row.
"""

from __future__ import annotations

import argparse
import functools
import random
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import machine_name, results_path
from e2e.conftest import FI_TINY
from e2e.harness import end_in_order
from e2e.served import SAMPLER, without_compiling
from e2e.server import Server, Timing, replay, vllm_server
from e2e.throughput import OURS, backends, record
from e2e.workloads import Model, Request, Workload, find

__all__ = ["main", "poisson_arrivals", "row"]

_WORKLOADS = {
    "cpu": "fi-tiny float32 32 prompts x 256",
    "cuda": "Llama-3.2-1B bf16 short 256x(1024,128)",
}


def poisson_arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Return times in seconds at which `count` requests arrive, `rate` a second on average."""
    source = random.Random(seed)
    times, now = [], 0.0
    for _ in range(count):
        now += source.expovariate(rate)
        times.append(now)
    return times


def _percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def row(timings: Sequence[Timing]) -> dict[str, float]:
    """Return the percentiles of a run, in us, and its requests a second."""
    found = {
        f"{name}_p{percent}_us": 1e6 * _percentile([getattr(t, field) for t in timings], percent)
        for name, field in (("ttft", "first"), ("tpot", "each"))
        for percent in (50, 99)
    }
    return {**found, "requests_per_s": len(timings) / max(timing.done for timing in timings)}


def start_vllm(
    model: Model, folder: Path, wanted: Sequence[str], gpu_bytes: int
) -> dict[str, Server]:
    """Start vLLM's servers, a log of each beside the model's folder."""
    contenders = backends(wanted)
    arguments = without_compiling(model.arguments(len(contenders), gpu_bytes))
    return {
        name: vllm_server(
            folder,
            model.dtype,
            backend.name,
            arguments,
            folder.parent / f"{name}.log",
            {**SAMPLER, **dict(backend.environment)},
        )
        for name, backend in contenders.items()
    }


def start(
    workload: Workload,
    directory: Path,
    starter: Callable[[Model, Path, Sequence[str], int], dict[str, Server]],
    wanted: Sequence[str],
) -> dict[str, Server]:
    """Start the server of each backend, all at once, and wait for them; leave out peers that fail.

    Raises:
        RuntimeError: ours has failed.
    """
    model = workload.model
    folder = directory / "model"
    shutil.copytree(model.folder(directory), folder)
    for file in FI_TINY.glob("tokenizer*.json"):  # a server does without only in part
        shutil.copy(file, folder)
    on_gpu = torch.cuda.is_available()
    gpu_bytes = torch.cuda.get_device_properties(0).total_memory if on_gpu else 0
    servers = starter(model, folder, wanted, gpu_bytes)
    ready = {}
    try:
        for name, server in servers.items():
            try:
                server.wait()
            except RuntimeError as error:
                server.close()
                if name == OURS:
                    raise
                print(f"{name} is not measured: {error}", flush=True)
            else:
                ready[name] = server
    except BaseException:
        close(servers)
        raise
    return ready


def close(servers: dict[str, Server]) -> None:
    """End all servers."""
    for server in servers.values():
        server.close()


def rounds_of(workload: Workload, count: int, most_tokens: int) -> list[list[Request]]:
    """Return `count` rounds of requests, none of which asks for more than `most_tokens`."""
    return [
        [(prompt, min(tokens, most_tokens)) for prompt, tokens in workload.requests(number)]
        for number in range(count)
    ]


def measure(
    servers: dict[str, Server], rounds: Sequence[Sequence[Request]], loads: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """Find the peak with the first round, then load each server with the others; yield the rows."""

    def load_server(name: str, cell: str, number: int, arrivals: list[float]) -> dict[str, Any]:
        server = servers[name]
        found = row(replay(server.url, server.api, rounds[number], arrivals))
        times = ", ".join(f"{k[:-3]} {v / 1000:.1f}" for k, v in found.items() if k.endswith("_us"))
        served = f"{found['requests_per_s']:.2f} requests/s"
        print(f"  {cell}, {name}: {times} ms, {served}", flush=True)
        return {"cell": cell, "backend": name, **found}

    peaks = {}
    for name, server in servers.items():
        few = rounds[0][:8]
        replay(server.url, server.api, few, [0.0] * len(few))  # what first use compiles and loads
        found = load_server(name, "all at once", 0, [0.0] * len(rounds[0]))
        peaks[name] = found["requests_per_s"]
        yield found
    peak = max((rate for name, rate in peaks.items() if name != OURS), default=peaks[OURS])
    for number, load in enumerate(loads, start=1):
        arrivals = poisson_arrivals(len(rounds[number]), load * peak, seed=number)
        for name in servers:
            yield load_server(name, f"{load:.0%} of peak", number, arrivals)


def main() -> None:
    """Parse the command line, measure, record the rows."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m e2e.latency", description=__doc__)
    parser.add_argument("--engine", choices=("vllm", "sglang"), default="vllm")
    parser.add_argument("--page-size", type=int, default=1, help="of SGLang's cache, in tokens")
    parser.add_argument("--workload", default=_WORKLOADS[device], help="see e2e/workloads.py")
    parser.add_argument("--backends", default="", help="only these peers, with commas between")
    parser.add_argument("--loads", nargs="+", type=float, default=[0.5, 0.9], help="of the peak")
    parser.add_argument("--most-tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/...")
    arguments = parser.parse_args()
    workload = find(arguments.workload)
    print(f"{arguments.engine} on {machine_name()}: {workload.name}", flush=True)
    starter, routine = start_vllm, f"e2e_{arguments.engine}_latency"
    if arguments.engine == "sglang":
        from e2e.sglang_server import start_sglang

        starter = functools.partial(start_sglang, arguments.page_size)
    wanted = [name for name in arguments.backends.split(",") if name]
    rounds = rounds_of(workload, 1 + len(arguments.loads), arguments.most_tokens)
    path = arguments.output or results_path(routine)
    end_in_order()
    with tempfile.TemporaryDirectory() as directory:
        servers = start(workload, Path(directory), starter, wanted)
        rows = []
        try:
            for found in measure(servers, rounds, arguments.loads):
                rows.append(found)
                record(rows, path, routine=routine, workload=workload.name)
        finally:
            close(servers)
    print("rows are in", path)


if __name__ == "__main__":
    main()
