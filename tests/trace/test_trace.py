"""Definitions: their form, what their references compute, and when calls write them."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fi_backend
from benchmarks.routines import ROUTINES, Options
from fi_backend import cli
from fi_backend.trace import TEMPLATES, Scalar, Tensor, TraceTemplate, model_definitions
from fi_backend.trace.calls import CallTrace

SMALL = Options(
    batch_size=3,
    s_qo=5,
    s_kv=37,
    num_qo_heads=4,
    num_kv_heads=2,
    head_dim_qk=64,
    head_dim_vo=64,
    hidden_size=128,
    q_dtype="float32",
    kv_dtype="float32",
    out_dtype="int8",
    causal=True,
    random_actual_seq_len=True,
    device="cpu",
)
LAYER = fi_backend.AttentionSpec(
    num_qo_heads=4, num_kv_heads=2, head_dim_qk=64, q_dtype=torch.bfloat16, page_size=16
)


def by_op(op_type: str) -> TraceTemplate:
    return next(template for template in TEMPLATES if template.op_type == op_type)


def load_reference(template: TraceTemplate) -> Callable[..., Any]:
    """Execute the source of a definition, as its reader would: with nothing of ours around."""
    namespace: dict[str, Any] = {}
    exec(compile(template.source(), template.op_type, "exec"), namespace)
    assert "fi_backend" not in template.source()
    return namespace["run"]  # type: ignore[no-any-return]


def assert_same(ours: Any, expected: Any) -> None:
    ours, expected = (x if isinstance(x, tuple) else (x,) for x in (ours, expected))
    for actual, wanted in zip(ours, expected, strict=False):
        assert actual.dtype == wanted.dtype
        # A quantised value at the border of two may fall to either side.
        step = 1.0 if actual.dtype == torch.int8 else 0.0
        torch.testing.assert_close(actual.float(), wanted.float(), rtol=1e-4, atol=step + 1e-4)


@pytest.mark.parametrize("name", sorted(ROUTINES))
def test_reference_agrees_with_our_kernels(name: str) -> None:
    routine = ROUTINES[name]
    inputs = routine.make(SMALL)
    expected = load_reference(routine.template)(**inputs)  # before a call overwrites its inputs
    bound = routine.bind(fi_backend, inputs, "auto")
    assert_same(bound.function(*bound.arguments), expected)


def test_references_of_single_calls_agree_with_our_kernels() -> None:
    q, k, v = torch.randn(5, 4, 64), torch.randn(9, 2, 64), torch.randn(9, 2, 64)
    options = {"window_left": 3, "logits_soft_cap": 2.0, "sm_scale": 0.3}
    assert_same(
        fi_backend.single_decode_with_kv_cache(q[0], k, v, **options, return_lse=True),
        load_reference(by_op("single_decode"))(q[0], k, v, **options),
    )
    assert_same(
        fi_backend.single_prefill_with_kv_cache(q, k, v, causal=True, **options, return_lse=True),
        load_reference(by_op("single_prefill"))(q, k, v, causal=True, **options),
    )
    bits = torch.rand(21) < 0.5
    for order in ("big", "little"):
        packed = load_reference(by_op("packbits"))(bits, order)
        assert torch.equal(fi_backend.packbits(bits, order), packed)


def test_reference_of_merging_in_place() -> None:
    v, other = torch.randn(2, 6, 4, 64).unbind()
    s, s_other = torch.randn(2, 6, 4).unbind()
    s[0] = s_other[0] = float("-inf")  # nothing was seen: (0, -inf)
    mask = torch.tensor([1, 1, 0, 1, 0, 1]).bool()
    expected = load_reference(by_op("merge_state_in_place"))(v, s, other, s_other, mask)
    assert torch.equal(expected[0][0], torch.zeros(4, 64))
    fi_backend.merge_state_in_place(v, s, other, s_other, mask)
    assert_same((v, s), expected)


def test_references_skip_what_calls_skip() -> None:
    cache = torch.zeros(2, 4, 1, 8)
    rows, slots = torch.ones(3, 1, 8), torch.tensor([5, -1, 0])
    stored, _ = load_reference(by_op("append_to_cache"))(rows, rows, cache, cache, slots)
    assert stored.flatten(0, 1)[:, 0, 0].tolist() == [1, 0, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.op_type)
def test_template_fits_its_calls_and_reference(template: TraceTemplate) -> None:
    assert list(inspect.signature(template.reference).parameters) == list(template.inputs)
    assert template.reference.__doc__
    for call in template.calls:
        target: Any = fi_backend
        for part in call.split("."):
            target = getattr(target, part)
        plan = getattr(getattr(fi_backend, call.split(".")[0]), "plan", None)
        known = {name for f in (target, plan) if f for name in inspect.signature(f).parameters}
        named = {template.renames.get(name, name) for name in known}
        if known & set(template.caches):
            named |= {"k_cache", "v_cache"}
        options = {"sm_scale", "window_left", "logits_soft_cap"}  # **kwargs of plan() in decode
        assert set(template.inputs) <= named | options, call


def test_definitions_of_a_model() -> None:
    definitions = model_definitions(LAYER, hidden_size=256)
    assert len(definitions) == len(TEMPLATES)
    names = [definition["name"] for definition in definitions]
    assert len(set(names)) == len(names)
    decode = definitions[0]
    assert decode["name"] == "gqa_paged_decode_h4_kv2_d64_ps16_bfloat16_bfloat16"
    assert decode["axes"]["page_size"] == {"type": "const", "value": 16}
    assert decode["axes"]["num_requests"] == {"type": "var"}
    assert decode["inputs"]["q"] == {
        "shape": ["num_requests", "num_qo_heads", "head_dim"],
        "dtype": "bfloat16",
    }
    assert decode["inputs"]["sm_scale"] == {"shape": None, "dtype": "float32"}
    assert decode["outputs"]["lse"]["dtype"] == "float32"
    for definition in definitions:
        json.dumps(definition)
        for value in (*definition["inputs"].values(), *definition["outputs"].values()):
            assert set(value["shape"] or ()) <= set(definition["axes"])
            assert (
                value["dtype"] in ("string", "bool", "int32", "uint8") or "float" in value["dtype"]
            )


def test_what_a_definition_misses_is_named() -> None:
    template = by_op("rmsnorm")
    with pytest.raises(ValueError, match="rmsnorm: sizes of hidden_size are missing"):
        template.definition({}, {"input": "bfloat16"})
    with pytest.raises(ValueError, match="rmsnorm: the dtype of input is missing"):
        template.definition({"hidden_size": 8}, {})


def test_command_writes_definitions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dims = "--num-qo-heads 4 --num-kv-heads 2 --head-dim 64 --kv-cache-dtype fp8_e4m3"
    assert cli.main(["trace", "--output", str(tmp_path), "--page-size", "32", *dims.split()]) == 0
    files = list(tmp_path.rglob("*.json"))
    assert f"wrote {len(TEMPLATES)} definitions" in capsys.readouterr().out
    assert len(files) == len(TEMPLATES)
    (path,) = (tmp_path / "gqa_paged_decode").iterdir()
    assert path.name == "gqa_paged_decode_h4_kv2_d64_ps32_bfloat16_float8_e4m3fn.json"
    assert json.loads(path.read_text())["reference"] == by_op("gqa_paged_decode").source()
    assert cli.main(["trace", "--output", str(tmp_path)]) == 1


def test_a_form_is_written_once_and_extras_never(tmp_path: Path) -> None:
    trace = CallTrace(tmp_path)
    norm = trace.wrap(fi_backend.rmsnorm)
    for tokens in (2, 3):
        norm(torch.ones(tokens, 8), torch.ones(8))
    (path,) = (tmp_path / "rmsnorm").iterdir()
    path.write_text("kept")
    norm(torch.ones(5, 8), torch.ones(8))
    assert path.read_text() == "kept"
    norm(torch.ones(5, 16), torch.ones(16))
    assert len(list((tmp_path / "rmsnorm").iterdir())) == 2
    # The reference has two dimensions, and knows neither masks nor scales.
    norm(torch.ones(2, 3, 8), torch.ones(8))
    with pytest.raises(TypeError, match="input must be a torch"):
        norm([1.0], torch.ones(8))
    prefill = trace.wrap(fi_backend.single_prefill_with_kv_cache)
    q = torch.ones(2, 1, 64)
    prefill(q, q, q, custom_mask=torch.ones(2, 2, dtype=torch.bool))
    prefill(q, q, q, k_scale=2.0)
    assert [item.name for item in tmp_path.iterdir()] == ["rmsnorm"]
    prefill(q, q, q)
    (path,) = (tmp_path / "single_prefill").iterdir()
    assert path.stem == "single_prefill_h1_kv1_d64_float32_float32"


def test_a_directory_that_cannot_be_written_stops_no_call(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    norm = CallTrace(tmp_path / "file").wrap(fi_backend.rmsnorm)
    with pytest.warns(UserWarning, match="rmsnorm_n8_float32 is not traced"):
        out = norm(torch.ones(2, 8), torch.ones(8))
    assert out.shape == (2, 8)


_PROGRAM = """
import torch, fi_backend as fi
table = [torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [0], [3])]
q, cache = torch.randn(1, 4, 64), torch.randn(1, 2, 16, 2, 64)
wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(torch.empty(16, dtype=torch.uint8))
wrapper.begin_forward(*table, 4, 2, 64, 16, q_data_type="float32")
wrapper.run_return_lse(q, cache)
wrapper.plan(*table, 4, 2, 64, 16, q_data_type="float32", pos_encoding_mode="ALIBI")
wrapper.run(q, cache)
prefill = fi.BatchPrefillWithPagedKVCacheWrapper(torch.empty(16, dtype=torch.uint8))
prefill.plan(table[0], *table, 4, 2, 64, 16, q_data_type="float32")
prefill.run(q, (cache[:, 0], cache[:, 1]))
other = fi.BatchPrefillWithPagedKVCacheWrapper(torch.empty(16, dtype=torch.uint8), "HND")
other.plan(table[0], *table, 4, 2, 64, 16, q_data_type="float32")
other.run(q, cache.transpose(2, 3))
batch = fi.BatchAttention(device="cpu")
batch.plan(table[0], *table, 4, 2, 64, 64, 16, q_data_type=q.dtype, kv_data_type=q.dtype)
batch.run(q, cache)
"""


@pytest.mark.parametrize("level", ["0", "3"])
def test_calls_of_a_program_are_written(level: str, tmp_path: Path) -> None:
    """Beside the log of calls too."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env={
            **os.environ,
            "FI_BACKEND_TRACE_DIR": str(tmp_path / "traces"),
            "FI_BACKEND_LOGLEVEL": level,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert ("run_return_lse #3" in done.stderr) == (level == "3")
    assert sorted(path.stem for path in (tmp_path / "traces").rglob("*.json")) == [
        "gqa_paged_decode_h4_kv2_d64_ps16_float32_float32",
        "gqa_paged_prefill_h4_kv2_d64_ps16_float32_float32",
    ]


def test_values_are_tensors_or_scalars() -> None:
    for template in TEMPLATES:
        assert all(isinstance(v, (Tensor, Scalar)) for v in template.inputs.values())
