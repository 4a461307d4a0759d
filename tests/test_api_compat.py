"""Names, order and defaults of every parameter are those that FlashInfer's callers rely on."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import fi_backend
from fi_backend._decode_options import DecodeOptions

SIGNATURES = [
    line
    for line in (Path(__file__).parent / "data/flashinfer_signatures.txt").read_text().splitlines()
    if not line.startswith("#")
]
BATCH_WRAPPERS = (
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
)
# Parameters that FlashInfer's do not have, after all that they have.
ADDED = {"BatchPrefillWithRaggedKVCacheWrapper.run": {"sinks": None}}
# Options of the decode wrapper's plan(), which takes them as **kwargs.
DECODE_PLAN_OPTIONS = {
    "pos_encoding_mode": "NONE",
    "window_left": -1,
    "logits_soft_cap": None,
    "q_data_type": "float16",
    "kv_data_type": None,
    "o_data_type": None,
    "data_type": None,
    "sm_scale": None,
    "rope_scale": None,
    "rope_theta": None,
    "non_blocking": True,
    "block_tables": None,
    "seq_lens": None,
    "fixed_split_size": None,
    "disable_split_kv": False,
    "q_len_per_req": 1,
    "window_right": 0,
}


def bare_signature(function: object) -> str:
    """The signature as text, without annotations."""
    signature = inspect.signature(function)  # type: ignore[arg-type]
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
    ]
    return str(inspect.Signature(parameters))


@pytest.mark.parametrize("line", SIGNATURES, ids=lambda line: line.split("(")[0])
def test_signature(line: str) -> None:
    name, rest = line.split("(", 1)
    target: object = fi_backend
    for part in name.split("."):
        target = getattr(target, part)
    added = "".join(f", {key}={default!r}" for key, default in ADDED.get(name, {}).items())
    assert bare_signature(target) == f"({rest[:-1]}{added})"


def test_signatures_cover_every_public_attention_call() -> None:
    modules = {"decode", "prefill", "cascade", "batch_attention"}
    public = {name for name, module in fi_backend._MODULE_OF.items() if module in modules}
    covered = {line.split("(")[0].split(".")[0] for line in SIGNATURES}
    assert public - covered == {"single_prefill_with_kv_cache_return_lse"}


def test_options_of_decode_plan() -> None:
    """Their order counts too: plan() still takes them by position."""
    assert [(f.name, f.default) for f in fields(DecodeOptions)] == list(DECODE_PLAN_OPTIONS.items())


@pytest.mark.parametrize("name", BATCH_WRAPPERS)
def test_aliases(name: str) -> None:
    wrapper = getattr(fi_backend, name)
    assert wrapper.begin_forward is wrapper.plan
    assert callable(wrapper.run_return_lse)
    assert isinstance(wrapper.is_cuda_graph_enabled, property)


def test_other_aliases() -> None:
    cascade = fi_backend.MultiLevelCascadeAttentionWrapper
    assert cascade.begin_forward is cascade.plan
    assert cascade.forward is cascade.run
    assert isinstance(fi_backend.BatchDecodeWithPagedKVCacheWrapper.use_tensor_cores, property)
    with_lse = fi_backend.single_prefill_with_kv_cache_return_lse
    assert with_lse.func is fi_backend.single_prefill_with_kv_cache
    assert with_lse.keywords == {"return_lse": True}


def test_modules_are_attributes_of_the_package() -> None:
    """FlashInfer's callers write flashinfer.decode.fast_decode_plan after one import."""
    code = "import fi_backend\nprint(fi_backend.decode.fast_decode_plan.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "fast_decode_plan"
