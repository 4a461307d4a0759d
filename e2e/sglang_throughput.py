"""Token throughput of a real SGLang with our backend and with its own, side by side.

    python -m e2e.throughput --engine sglang

As for vLLM: all engines of a model run all the time and take the same batch in turn. They start
once for each page size. JSON goes to benchmarks/results/<machine>/e2e_sglang.json.

On a GPU the models are dummy weights, the peers fa3, triton and SGLang's own flashinfer. A minute
or two:

    python -m e2e.throughput --engine sglang --workloads "1B bf16 long" --backends fa3 --rounds 1
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import machine_name, results_path
from e2e import workloads
from e2e.served import Answer
from e2e.sglang_served import SGLang
from e2e.throughput import OURS, Backend, best_answers, record, report, started
from e2e.workloads import Model, Workload

__all__ = ["backends", "engine_arguments", "main"]

_CPU_ENGINE = {
    "device": "cpu",
    "max_total_tokens": 32768,
    "max_running_requests": 32,
    "disable_overlap_schedule": True,
    "disable_cuda_graph": True,
}
_GPU_ENGINE = {
    "load_format": "dummy",
    "context_length": 16384,
    "mem_fraction_static": 0.98,  # of no effect: max_total_tokens says the size
    "max_running_requests": 256,
    "chunked_prefill_size": 8192,
    "cuda_graph_max_bs_decode": 256,
}


def backends(wanted: Sequence[str]) -> dict[str, Backend]:
    """Return ours and SGLang's own, those in `wanted` if it names any."""
    peers = {"torch_native": Backend("torch_native")}
    if torch.cuda.is_available():
        peers = {
            "fa3": Backend("fa3"),
            "triton": Backend("triton"),
            "flashinfer": Backend("flashinfer", (("FI_BACKEND_KEEP_FLASHINFER", "1"),)),
        }
    unknown = sorted(set(wanted) - set(peers))
    if unknown:
        raise SystemExit(f"--backends must be of {', '.join(peers)}; got {', '.join(unknown)}")
    chosen = {name: peer for name, peer in peers.items() if not wanted or name in wanted}
    return {OURS: Backend(OURS), **chosen}


def engine_arguments(
    model: Model, page_size: int, num_engines: int, gpu_bytes: int
) -> dict[str, Any]:
    """Arguments of SGLang's Engine that mean what the model's mean to vLLM.

    Args:
        model: whose.
        page_size: tokens of a page of the cache.
        num_engines: engines that share the GPU.
        gpu_bytes: its memory; 0 without a GPU.
    """
    asked = model.arguments(num_engines, gpu_bytes)
    fp8 = asked.get("kv_cache_dtype") == "fp8"
    common = {
        "page_size": page_size,
        "disable_radix_cache": not asked.get("enable_prefix_caching", False),
        "kv_cache_dtype": "fp8_e4m3" if fp8 else "auto",
    }
    if model.shape is None or not gpu_bytes:
        return {**_CPU_ENGINE, **common}
    shape = model.shape
    width = shape["num_key_value_heads"] * shape["head_dim"] * (1 if fp8 else 2)
    token_bytes = 2 * shape["num_hidden_layers"] * width
    tokens = asked["kv_cache_memory_bytes"] // token_bytes
    return {**_GPU_ENGINE, **common, "max_total_tokens": tokens // page_size * page_size}


def start(
    model: Model, contenders: dict[str, Backend], page_size: int, directory: Path
) -> dict[str, SGLang]:
    """Start an engine for each backend, all at once; leave out peers that do not start."""
    on_gpu = torch.cuda.is_available()
    gpu_bytes = torch.cuda.get_device_properties(0).total_memory if on_gpu else 0
    folder = model.folder(directory)
    arguments = engine_arguments(model, page_size, len(contenders), gpu_bytes)
    began = time.monotonic()
    starting = {
        name: SGLang(
            folder,
            model.dtype,
            backend.name or name,
            arguments,
            directory / f"{name}.log",
            dict(backend.environment),
        )
        for name, backend in contenders.items()
    }
    return started(starting, began)


def measure(
    chosen: Iterable[Workload],
    contenders: dict[str, Backend],
    page_size: int,
    arguments: argparse.Namespace,
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Run workloads of one model; yield the name and rows of each as it is done.

    With several starts a workload comes up again, with rows of all starts so far.
    """
    chosen = list(chosen)
    results: dict[str, list[dict[str, Answer]]] = {workload.name: [] for workload in chosen}
    for _ in range(arguments.starts):
        with tempfile.TemporaryDirectory() as directory:
            engines = start(chosen[0].model, contenders, page_size, Path(directory))
            try:
                for engine in engines.values():
                    engine.warm_up(chosen[0])
                for workload in chosen:
                    answers = best_answers(
                        engines, workload, arguments.rounds, arguments.most_seconds
                    )
                    results[workload.name].append(answers)
                    shown = dataclasses.replace(
                        workload, label=f"{workload.label}, page {page_size}"
                    )
                    yield shown.name, report(shown, results[workload.name])
            finally:
                for engine in engines.values():
                    engine.close()


def main(words: Sequence[str]) -> None:
    """Parse the command line, run the workloads, record the rows."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m e2e.throughput --engine sglang", description=__doc__
    )
    parser.add_argument(
        "--workloads", nargs="+", default=[""], help="only those whose name has one of these texts"
    )
    parser.add_argument("--backends", default="", help="only these peers, with commas between")
    parser.add_argument(
        "--page-sizes", nargs="+", type=int, default=[1, 64] if on_gpu else [1], help="in tokens"
    )
    parser.add_argument("--starts", type=int, default=1, help="starts of all engines")
    parser.add_argument(
        "--rounds", type=int, default=2 if on_gpu else 5, help="batches for each engine and start"
    )
    parser.add_argument(
        "--most-seconds", type=float, default=math.inf, help="no further round after that many"
    )
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/...")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args(words)
    contenders = backends([name for name in arguments.backends.split(",") if name])
    every = workloads.GPU if on_gpu else workloads.CPU
    texts = arguments.workloads
    chosen = [workload for workload in every if any(text in workload.name for text in texts)]
    print(f"SGLang on {machine_name()}; ratio: ours over the best peer", flush=True)
    path = arguments.output or results_path("e2e_sglang")
    rows: dict[str, list[dict[str, Any]]] = {}
    for _, found in itertools.groupby(chosen, key=lambda workload: id(workload.model)):
        of_model = list(found)
        for page_size in arguments.page_sizes:
            for name, of_cell in measure(of_model, contenders, page_size, arguments):
                rows[name] = of_cell
                if not arguments.no_write:  # what is cut short keeps the others
                    record(itertools.chain(*rows.values()), path, routine="e2e_sglang")
