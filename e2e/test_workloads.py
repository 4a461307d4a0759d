"""The throughput run's workloads: what engines are given is the same work for all of them."""

from __future__ import annotations

import json

import pytest

from e2e.served import Answer, Batch, answer_batches
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
    assert workload.prefixes is not None
    (prefix,), requests = workload.prefixes(3), workload.requests(3)
    assert len(prefix) == 12000
    assert all(prompt[:12000] == prefix for prompt, _ in requests)
    assert len({tuple(prompt) for prompt, _ in requests}) == len(requests) == 256


@pytest.mark.parametrize("cache", ["bf16", "bf16, fp8 KV cache"])
def test_a_tree_has_variants_below_its_system_prompts(cache: str) -> None:
    workload = find(f"Llama-3.2-1B {cache} prefix tree 240x(6000+3000+64,256) 3x4")
    assert workload.prefixes is not None
    prefixes, requests = workload.prefixes(3), workload.requests(3)
    assert {len(prefix) for prefix in prefixes} == {9000}
    assert len({tuple(prefix) for prefix in prefixes}) == len(prefixes) == 3 * 4
    assert len({tuple(prefix[:6000]) for prefix in prefixes}) == 3
    of_prefix = [0] * len(prefixes)
    for prompt, new in requests:
        assert (len(prompt), new) == (9064, 256)
        of_prefix[prefixes.index(prompt[:9000])] += 1
    assert of_prefix == [20] * 12
    assert len({tuple(prompt) for prompt, _ in requests}) == 240


def test_a_cache_is_filled_with_one_prefix_after_the_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    workload = find("Llama-3.2-1B bf16 prefix tree 240x(6000+3000+64,256) 3x4")
    ran: list[tuple[str, Batch]] = []

    def run(batch: Batch, kind: str) -> Answer:
        ran.append((kind, batch))
        return {}

    answer_batches([json.dumps({"workload": workload.name, "round": 1, "kind": "whole"})], run)
    assert capsys.readouterr().out.count("ANSWER {}") == 2
    assert workload.prefixes is not None
    *before, (kind, batch) = ran
    assert before == [
        ("prefix", {"prompts": [prefix], "max_tokens": 1}) for prefix in workload.prefixes(1)
    ]
    assert kind == "whole"
    assert list(zip(batch["prompts"], batch["max_tokens"], strict=True)) == workload.requests(1)


def test_engines_share_a_gpu() -> None:
    """Weights of the 8B shape are 16 GB; what is left of a third of the GPU is cache."""
    model = GPU[0].model
    cache = model.arguments(3, 140 * GIB)["kv_cache_memory_bytes"]
    assert 16e9 < model.weight_bytes < 16.2e9
    assert 0 < cache < 0.95 * 140 * GIB / 3 - model.weight_bytes
    with pytest.raises(ValueError, match=r"7 engines of .* choose fewer with --backends"):
        model.arguments(7, 140 * GIB)
