"""Decode context parallelism: two ranks, half of a cache each, see what one with all of it does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fi_backend import warmup
from fi_backend.errors import UnsupportedError
from fi_backend.jit import KernelSpec
from tests.integrations.context_parallel_ranks import OURS, Case, run_ranks
from tests.integrations.vllm_step import Load, make_builder, make_impl, make_step

DECODES, CHUNK, PROMPT = (0, 2), (2, 3), (3, 4)
CASES = {
    "mixed": Case(),
    "mixed, in pages": Case(interleave=16),
    "decode": Case(requests=DECODES),
    "decode, in pages": Case(requests=DECODES, interleave=16),
    "chunk": Case(requests=CHUNK, interleave=4),
    "prompts alone": Case(requests=PROMPT),
    "not causal": Case(causal=False),
    "soft cap": Case(impl={"logits_soft_cap": 5.0}, mask={"logits_soft_cap": 5.0}),
    "sinks": Case(sinks=True),
    "fp8": Case(impl={"kv_cache_dtype": "fp8"}),
}


@pytest.fixture(scope="module")
def errors(vllm: Load, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return run_ranks(CASES, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_see_what_one_does(case: str, errors: dict[str, list[str]]) -> None:
    assert errors[case] == ["", ""]


@pytest.fixture
def one_of_two(vllm: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process a rank of two, which cannot talk to the other."""
    group = SimpleNamespace(world_size=2, rank_in_group=1)
    monkeypatch.setattr(vllm("distributed.parallel_state"), "_DCP", group)


@pytest.mark.parametrize("interleave", [1, 4, 16])
def test_lengths_are_the_engines(interleave: int, vllm: Load) -> None:
    expected = vllm("v1.attention.backends.utils").get_dcp_local_seq_lens
    from fi_backend.integrations.vllm.context_parallel import Shard

    step = make_step(vllm)
    new = step.common.query_start_loc.diff()
    for rank in range(3):
        metadata = make_builder(vllm, {}).build(0, step.common)
        shard = Shard(3, rank, interleave, max_reqs=8, device=torch.device("cpu"))
        shard.split(metadata)
        want = expected(step.common.seq_lens - new, 3, rank, interleave)
        assert metadata.batch.kv_lens.tolist() == want.tolist()
        assert metadata.new_tokens.kv_lens.tolist() == new.tolist()


@pytest.mark.usefixtures("one_of_two")
def test_draft_steps_split_their_lengths_again(vllm: Load) -> None:
    """A graph replays it: the same memory, and what the engine's lengths are by then."""
    step = make_step(vllm)
    builder = make_builder(vllm, {"layer": make_impl(OURS)}, shape=OURS)
    metadata = builder.build(0, step.common)
    before = metadata.batch.kv_lens
    lens, plans = before.clone(), {key: p.buffer.clone() for key, p in metadata.plans.items()}
    step.common.seq_lens[:2] += 32
    builder.update_draft_decode_metadata(metadata)
    assert metadata.batch.kv_lens.data_ptr() == before.data_ptr()
    assert (metadata.batch.kv_lens - lens).tolist() == [16, 16, 0, 0, 0]
    changed = [key for key, p in metadata.plans.items() if not torch.equal(p.buffer, plans[key])]
    assert len(metadata.plans) == 2
    assert len(changed) == 1


@pytest.mark.usefixtures("one_of_two")
def test_the_merge_is_compiled_with_the_rest(vllm: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[list[KernelSpec]] = []
    monkeypatch.setattr(warmup, "build", builds.append)
    make_builder(vllm, {"layer": make_impl(OURS)}, shape=OURS)
    (specs,) = builds
    names = [spec.name for spec in specs]
    assert len(names) == len(set(names))
    assert [name for name in names if name.startswith("merge")] == ["merge_cpu_f32_f32"]


@pytest.mark.usefixtures("one_of_two")
@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"sliding_window": 8}, "sliding_window"),
        ({"alibi_slopes": [0.5] * 3}, "alibi_slopes"),
        ({"kv_sharing_target_layer_name": "other"}, "kv_sharing_target_layer_name"),
        ({"attn_type": "encoder_decoder"}, "encoder_decoder"),
    ],
)
def test_what_two_ranks_do_not_serve(asked: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{reason}.*decode-context-parallel-size 2"):
        make_impl(OURS, **asked)


@pytest.mark.usefixtures("one_of_two")
def test_two_ranks_are_not_batch_invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(UnsupportedError, match="VLLM_BATCH_INVARIANT"):
        make_impl(OURS)


@pytest.mark.usefixtures("one_of_two")
def test_the_engine_lets_us_serve(vllm: Load) -> None:
    """vLLM asks each layer before it serves. Keys must be rotated before a layer sees them."""
    utils = vllm("v1.worker.cp_utils")
    impl = make_impl(OURS)
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            prefill_context_parallel_size=1,
            decode_context_parallel_size=2,
            cp_kv_cache_interleave_size=16,
        ),
        speculative_config=SimpleNamespace(),
    )
    layers = {"layer": SimpleNamespace(impl=impl)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "get_layers_from_vllm_config", lambda *_: layers)
        utils.check_attention_cp_compatibility(config)
    assert not impl.lse_base_on_e
    assert not impl.fused_rope_kvcache_supported()


@pytest.mark.usefixtures("one_of_two")
def test_an_encoder_has_no_cache_to_share() -> None:
    assert make_impl(attn_type="encoder_only").num_shards == 1
