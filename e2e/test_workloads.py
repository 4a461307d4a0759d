"""The throughput run's workloads: what engines are given is the same work for all of them."""

from __future__ import annotations

import pytest

from e2e.workloads import CPU, GPU, Workload, find

GIB = 1 << 30


def test_names_find_their_workload() -> None:
    for workload in (*CPU, *GPU):
        assert find(workload.name) is workload


@pytest.mark.parametrize("workload", GPU, ids=lambda workload: workload.name)
def test_rounds_are_as_long_but_other_tokens(workload: Workload) -> None:
    """Or a prefix cache would remember the round before."""
    first, again, second = (workload.requests(number) for number in (0, 0, 1))
    assert first == again
    lengths = [[(len(prompt), new) for prompt, new in requests] for requests in (first, second)]
    assert lengths[0] == lengths[1]
    assert all(a[0][:16] != b[0][:16] for a, b in zip(first, second, strict=True))
    longest = workload.model.engine["max_model_len"]
    assert max(prompt + new for prompt, new in lengths[0]) <= longest


def test_a_shared_prefix_begins_every_prompt() -> None:
    workload = find("Llama-3.2-1B bf16 shared prefix 256x(12000+64,256)")
    assert workload.prefix is not None
    prefix, requests = workload.prefix(3), workload.requests(3)
    assert len(prefix) == 12000
    assert all(prompt[:12000] == prefix for prompt, _ in requests)
    assert len({tuple(prompt) for prompt, _ in requests}) == len(requests) == 256


def test_engines_share_a_gpu() -> None:
    """Weights of the 8B shape are 16 GB; what is left of a third of the GPU is cache."""
    model = GPU[0].model
    cache = model.arguments(3, 140 * GIB)["kv_cache_memory_bytes"]
    assert 16e9 < model.weight_bytes < 16.2e9
    assert 0 < cache < 0.95 * 140 * GIB / 3 - model.weight_bytes
    with pytest.raises(ValueError, match=r"7 engines of .* choose fewer with --backends"):
        model.arguments(7, 140 * GIB)
