"""How long engines take to start, and what memory they take beyond their caches.

    python -m e2e.startup
    python -m e2e.startup --engine sglang --page-size 64 --backends fa3

Each backend's engine starts twice, alone on the machine, the stock ones first: they find the
packages on disk for all. Our first start finds nothing compiled. A row's `us` is the time from the
start of the process until it takes requests; its memory is what the machine holds more than before,
when the engine is ready and after a round of requests. Caches of keys and values have the same size
in all of them, so that rows differ by what backends take; `builder_bytes` is what the tensors of
all our metadata builders of a vLLM take. JSON goes to
benchmarks/results/<machine>/e2e_<engine>_startup.json, after each start.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import machine_name, results_path
from e2e import sglang_throughput, throughput
from e2e.memory import family_bytes
from e2e.served import Child
from e2e.throughput import OURS, Backend, record
from e2e.workloads import Workload, find

__all__ = ["main", "measure"]

_WORKLOADS = {
    "cpu": "fi-tiny float32 32 prompts x 256",
    "cuda": "Llama-3.2-1B bf16 short 256x(1024,128)",
}
Starter = Callable[[dict[str, Backend], Path], dict[str, Child]]


def measure(
    contenders: dict[str, Backend], workload: Workload, start: Starter
) -> Iterator[dict[str, Any]]:
    """Start each engine twice; yield a row for each start.

    Args:
        contenders: the backends; ours comes last, whatever its place.
        workload: what an engine is asked once it is ready.
        start: starts the engines of some backends, with a folder for what they write.
    """
    order = sorted(contenders, key=lambda name: name == OURS)
    with tempfile.TemporaryDirectory() as folder:
        for name in order:
            cache = ("FI_BACKEND_CACHE_DIR", str(Path(folder, "kernels")))
            backend = contenders[name]
            backend = dataclasses.replace(backend, environment=(*backend.environment, cache))
            for number in ("first", "second"):
                directory = Path(folder, f"{name}-{number}")
                directory.mkdir()
                row = _start_once(name, backend, workload, start, directory)
                if row is not None:
                    yield {"cell": workload.model.name, "backend": name, "start": number, **row}


def _start_once(
    name: str, backend: Backend, workload: Workload, start: Starter, directory: Path
) -> dict[str, Any] | None:
    before = family_bytes()
    began = time.perf_counter()
    engines = start({name: backend}, directory)
    us = 1e6 * (time.perf_counter() - began)
    try:
        for engine in engines.values():
            ready = family_bytes()
            engine.warm_up(workload)
            answer = engine.run(workload, 0)
            served = family_bytes()
            if bool(answer["counters"]["attention_runs"]) != (name == OURS):
                raise RuntimeError(f"{name}: another backend has served: {answer['counters']}")
            return {
                "us": us,
                "ready_bytes": {kind: ready[kind] - before[kind] for kind in before},
                "served_bytes": {kind: served[kind] - before[kind] for kind in before},
                "builder_bytes": answer.get("builder_bytes"),
            }
    finally:
        for engine in engines.values():
            engine.close()
    return None


def _starter(arguments: argparse.Namespace, workload: Workload) -> Starter:
    if arguments.engine == "sglang":
        return lambda contenders, directory: sglang_throughput.start_sglang(
            workload.model, contenders, arguments.page_size, directory
        )
    return functools.partial(
        throughput.start_vllm, workload.model, quick=not arguments.torch_compile
    )


def main() -> None:
    """Parse the command line, start the engines, record the rows."""
    parser = argparse.ArgumentParser(prog="python -m e2e.startup", description=__doc__)
    parser.add_argument("--engine", choices=("vllm", "sglang"), default="vllm")
    parser.add_argument("--page-size", type=int, default=1, help="of SGLang's cache, in tokens")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--workload", default=_WORKLOADS[device], help="see e2e/workloads.py")
    parser.add_argument("--backends", default="", help="only these peers, with commas between")
    parser.add_argument("--torch-compile", action="store_true", help="vLLM compiles the model")
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/...")
    arguments = parser.parse_args()
    wanted = [name for name in arguments.backends.split(",") if name]
    backends = sglang_throughput.backends if arguments.engine == "sglang" else throughput.backends
    workload, routine = find(arguments.workload), f"e2e_{arguments.engine}_startup"
    conditions = {"page_size": arguments.page_size} if arguments.engine == "sglang" else {}
    conditions |= {"torch_compile": arguments.torch_compile}
    path = arguments.output or results_path(routine)
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"{arguments.engine} on {machine_name()}: {workload.model.name}", flush=True)
    rows = []
    for row in measure(backends(wanted), workload, _starter(arguments, workload)):
        rows.append(row)
        record(rows, path, routine=routine, **conditions)
        held = {kind: f"{size / 2**20:.0f} MiB" for kind, size in row["served_bytes"].items()}
        print(f"{row['backend']}, {row['start']}: {row['us'] / 1e6:.1f} s, {held}", flush=True)


if __name__ == "__main__":
    main()
