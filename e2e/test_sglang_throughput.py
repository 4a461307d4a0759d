"""The arguments that SGLang's engines get mean what the models' mean."""

from __future__ import annotations

import pytest
import torch

from e2e.sglang_throughput import backends, engine_arguments
from e2e.throughput import OURS
from e2e.workloads import CPU, find

GIB = 1 << 30


@pytest.mark.parametrize(("cache", "width"), [("bf16", 2), ("bf16, fp8 KV cache", 1)])
def test_the_cache_fills_an_engines_share_of_the_gpu(cache: str, width: int) -> None:
    model = find(f"Llama-3.2-1B {cache} short 256x(1024,128)").model
    arguments = engine_arguments(model, page_size=64, num_engines=3, gpu_bytes=140 * GIB)
    tokens = arguments["max_total_tokens"]
    room = model.arguments(3, 140 * GIB)["kv_cache_memory_bytes"]
    token_bytes = 2 * 16 * 8 * 64 * width  # keys and values of 16 layers, 8 heads of 64
    assert tokens % 64 == 0
    assert 0 <= room - tokens * token_bytes < 64 * token_bytes
    assert arguments["kv_cache_dtype"] == ("auto" if width == 2 else "fp8_e4m3")
    assert not arguments["disable_radix_cache"]


def test_without_a_gpu_steps_are_eager() -> None:
    arguments = engine_arguments(CPU[0].model, page_size=1, num_engines=2, gpu_bytes=0)
    assert arguments["device"] == "cpu"
    assert arguments["disable_cuda_graph"]
    assert arguments["disable_radix_cache"]


def test_peers_are_chosen_by_name() -> None:
    every = list(backends([]))
    assert every[0] == OURS
    assert "flashinfer" in every or not torch.cuda.is_available()
    assert list(backends(every[1:2])) == [OURS, every[1]]
    with pytest.raises(SystemExit, match=r"--backends must be of .*; got vllm"):
        backends(["vllm"])
