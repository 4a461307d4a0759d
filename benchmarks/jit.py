"""Cold JIT of CUDA kernels: seconds from an empty cache to modules that load, in one build.

It needs nvcc but no GPU: where there is none, FI_BACKEND_CUDA_ARCH_LIST says what to compile for. A
row's `us` is the time of the build, `modules` how many it made. Commands run on all cores, or on as
many as MAX_JOBS says. On a machine that has just started, the first row is for the most part what
it takes to read the compilers from disk.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.report import Row, print_row
from fi_backend.jit import KernelSpec, build
from fi_backend.kernels import activation, append_kv, merge, norm, rope, rope_append
from fi_backend.spec import AttentionSpec
from fi_backend.warmup import attention_kernels, specs_for_model

LLAMA_8B = {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "torch_dtype": "bfloat16",
}


def cells() -> dict[str, list[KernelSpec]]:
    """Return the modules of every cell, all for bf16 and heads of 128.

    A decode wrapper compiles the planner and the few-row kernel at its first plan(), an engine all
    kernels of its layers and what writes their cache before its first step.
    """
    layer = AttentionSpec(
        num_qo_heads=32, num_kv_heads=8, head_dim_qk=128, q_dtype=torch.bfloat16, page_size=16
    )
    engine = attention_kernels([layer], "cuda")
    decode = attention_kernels([layer], "cuda", max_qo_len=1)
    bf16 = torch.bfloat16
    small = [
        norm.rmsnorm_cuda_spec(bf16),
        norm.layernorm_cuda_spec(bf16),
        rope.rope_cuda_spec(bf16),
        rope_append.rope_append_cuda_spec(bf16, bf16),
        activation.activation_cuda_spec(bf16),
        append_kv.append_cuda_spec(bf16, bf16),
    ]
    return {
        "merge, the first to use the compilers": [merge.merge_cuda_spec(bf16, bf16)],
        "decode wrapper: plan, decode": [s for s in decode if not s.name.startswith("append")],
        "plan, decode, append, merge": [*decode, merge.merge_cuda_spec(bf16, bf16)],
        "engine: plan, decode, prefill, mixed, append": engine,
        "norm, rope, activation, append": small,
        "all of Llama-3.1-8B": specs_for_model(LLAMA_8B, "cuda"),
        "prefill alone": [spec for spec in engine if spec.name.startswith("prefill")],
    }


@contextmanager
def empty_cache() -> Iterator[None]:
    """Let the JIT see no compiled kernel."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as directory:
        os.environ["FI_BACKEND_CACHE_DIR"] = directory
        os.environ.pop("FI_BACKEND_AOT_DIR", None)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def run(pattern: str, seconds: float) -> Iterator[list[Row]]:
    """Build the cells whose names contain `pattern`, once each; `seconds` is not used."""
    for name, specs in cells().items():
        if pattern not in name:
            continue
        start = time.perf_counter()

        def report(done: int, total: int, what: str, start: float = start) -> None:
            print(f"  {time.perf_counter() - start:5.1f} s  {done}/{total} {what}", flush=True)

        with empty_cache():
            made = build(specs, progress=report)
        us = (time.perf_counter() - start) * 1e6
        assert len(made.built) == len(specs), "a kernel was there already"
        row = Row(name, "fi_backend", us, "modules", len(made.built), 0.0)
        print_row(row, us)
        yield [row]
