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
import itertools
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import machine_name, results_path
from e2e.served import Child
from e2e.sglang_served import SGLang
from e2e.sglang_site import CPU_ARGUMENTS
from e2e.throughput import (
    OURS,
    Backend,
    chosen_models,
    chosen_peers,
    gpu_bytes,
    measure,
    options,
    record_all,
    started,
    with_setting,
)
from e2e.workloads import Model

__all__ = ["backends", "engine_arguments", "main"]

_CPU_ENGINE = {
    **CPU_ARGUMENTS,
    "max_total_tokens": 32768,
    "max_running_requests": 32,
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
    return {OURS: Backend(OURS), **chosen_peers(peers, wanted)}


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


def start_sglang(
    model: Model, contenders: dict[str, Backend], page_size: int, directory: Path
) -> dict[str, Child]:
    """Start an engine for each backend, all at once; leave out peers that do not start."""
    folder = model.folder(directory)
    arguments = engine_arguments(model, page_size, len(contenders), gpu_bytes())
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


def main(words: Sequence[str]) -> None:
    """Parse the command line, run the workloads, record the rows."""
    parser = argparse.ArgumentParser(
        prog="python -m e2e.throughput --engine sglang", description=__doc__, parents=[options(1)]
    )
    page_sizes = [1, 64] if torch.cuda.is_available() else [1]
    parser.add_argument("--page-sizes", nargs="+", type=int, default=page_sizes, help="in tokens")
    arguments = parser.parse_args(words)
    wanted = [name for name in arguments.backends.split(",") if name]
    contenders = with_setting(backends(wanted), arguments.also)
    print(f"SGLang on {machine_name()}; ratio: ours over the best peer", flush=True)
    path = None if arguments.no_write else arguments.output or results_path("e2e_sglang")
    measured = (
        measure(
            chosen,
            partial(start_sglang, chosen[0].model, contenders, page_size),
            arguments,
            note=f", page {page_size}",
        )
        for chosen in chosen_models(arguments.workloads)
        for page_size in arguments.page_sizes
    )
    record_all(itertools.chain.from_iterable(measured), path, routine="e2e_sglang")
