"""What we tell vLLM that we support: every question that it knows, and every refusal by name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from tests.integrations.vllm_step import Load

# The answers to vLLM's questions without arguments, of 0.25 to 0.33. docs/vllm.md says why.
ANSWERS = {
    "supports_sink": True,
    "supports_sliding_window": True,
    "supports_non_causal": True,
    "supports_kv_connector": True,
    "supports_device_cpu_query_lens_mismatch": True,
    "supports_alibi_sqrt": False,
    "supports_batch_invariance": True,
    "supports_dcp": True,
    "supports_mm_prefix": False,
    "supports_non_causal_dcp": False,
    "supports_pcp": False,
    "supports_per_head_quant_scales": False,
    "supports_rswa": False,
}


def ours(name: str = "FIAttentionBackend") -> Any:
    from fi_backend.integrations.vllm import backend

    return getattr(backend, name)


def test_every_question_of_this_version_has_its_answer(vllm: Load) -> None:
    """A question that a new version adds fails here, until somebody has thought about it."""
    stock = vllm("v1.attention.backend").AttentionBackend
    questions = [
        name
        for name, method in inspect.getmembers(stock, inspect.ismethod)
        if name.startswith("supports_") and not inspect.signature(method).parameters
    ]
    assert len(questions) >= 7
    answers = {name: getattr(ours(), name)() for name in questions}
    assert answers == {name: ANSWERS[name] for name in questions}


@pytest.mark.parametrize(
    ("question", "yes", "no"),
    [
        ("supports_attn_type", ("decoder", "encoder_only", "encoder_decoder"), ("encoder",)),
        ("supports_kv_cache_dtype", ("auto", "fp8", "fp8_e5m2", None), ("int8", "nvfp4")),
        ("supports_block_size", (16, 48, 528, None), (8, 24)),
        ("supports_dtype", (torch.float32, torch.bfloat16, torch.float16), (torch.float64,)),
        ("supports_head_size", (64, 80, 96, 128, 192, 256), ()),
    ],
)
def test_questions_about_values(
    question: str, yes: tuple[Any, ...], no: tuple[Any, ...], vllm: Load
) -> None:
    ask = getattr(ours(), question)
    assert {value: ask(value) for value in (*yes, *no)} == {
        **dict.fromkeys(yes, True),
        **dict.fromkeys(no, False),
    }


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"use_mla": True}, "MLA"),
        ({"use_sparse": True}, "sparse"),
        ({"use_mm_prefix": True}, "multimodal"),
        ({"use_per_head_quant_scales": True}, "per-head quant scales"),
        ({"use_pcp": True}, "PCP"),
        ({"use_rswa": True}, "R-SWA"),
        ({"attn_type": "encoder"}, "attention type encoder"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype"),
        ({"head_size": 36}, "head_dim_qk"),
        ({"block_size": 24}, "block_size"),
    ],
)
def test_refusals_name_what_is_refused(asked: dict[str, Any], reason: str, vllm: Load) -> None:
    config = vllm("v1.attention.selector").AttentionSelectorConfig
    if not set(asked) <= set(config._fields):
        pytest.skip(f"this vLLM does not ask about {', '.join(asked)}")
    wanted = {"head_size": 64, "dtype": torch.float32, "kv_cache_dtype": "auto", "block_size": 16}
    reasons = ours().validate_configuration(
        device_capability=None, **config(**{**wanted, **asked})._asdict()
    )
    assert len(reasons) == 1
    assert reason.lower() in reasons[0].lower()


def test_names_are_members_of_the_engines_table(vllm: Load) -> None:
    """vLLM looks the chosen backend up by the name that it gives itself."""
    table = vllm("v1.attention.backends.registry").AttentionBackendEnum
    for name, member in (("FIAttentionBackend", "FLASHINFER"), ("FICustomBackend", "CUSTOM")):
        assert table[ours(name).get_name()] is table[member]
        assert not ours(name).forward_includes_kv_cache_update
        assert not ours(name).is_mla()
