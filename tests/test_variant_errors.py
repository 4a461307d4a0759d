"""What custom attention variants refuse, and what the refusals say."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from variant_examples import EXAMPLES
from wrapper_cases import decode_wrapper, make_case, plan_decode, plan_prefill, prefill_wrapper

import fi_backend as fi
from fi_backend.errors import BuildError, UnsupportedError
from fi_backend.jit import paths

BIAS, SIGMOID = EXAMPLES["distance_bias"].variant, EXAMPLES["sigmoid"].variant
SEES = "FI_HOST_DEVICE bool sees(const Pair& at) const { return at.kv_idx % 2 == 0; }"
F32 = torch.float32


def variant(**fields: Any) -> fi.AttentionVariant:
    return fi.AttentionVariant(**{"name": "checked", "source": SEES, **fields})


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"name": "no-identifier"}, ValueError, "name: a name must be a C.. identifier"),
        ({"name": "x" * 41}, ValueError, "up to 40 characters"),
        ({"tensors": {"1st": F32}}, ValueError, "tensors and scalars: .*'1st'"),
        ({"tensors": {"sees": F32}}, ValueError, "not one of .*sees"),
        (
            {"tensors": {"x": torch.bfloat16}},
            ValueError,
            r"tensors\['x'\] must be one of .*bfloat16",
        ),
        ({"tensors": {"x": F32}, "scalars": {"x": int}}, ValueError, "'x' twice"),
        ({"scalars": {"x": str}}, ValueError, r"scalars\['x'\] must be float or int"),
        ({"tensors": {f"t{i}": F32 for i in range(17)}}, ValueError, "at most 128 bytes.*136"),
        ({"source": b""}, TypeError, "source must be a str"),
        ({"source": '\n  # include "mine.h"\n'}, ValueError, "must not include files"),
    ],
)
def test_malformed_declarations(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        variant(**fields)


def test_the_byte_limit_is_that_of_the_kernels() -> None:
    text = (paths.CSRC / "include/fi_backend/attention/params.h").read_text()
    assert re.search(r"kMaxVariantBytes = 128;", text)
    variant(tensors={f"t{i}": F32 for i in range(16)})


def test_equality_is_that_of_all_text() -> None:
    assert variant() == variant()
    assert hash(variant()) == hash(variant())
    for other in ({"name": "y"}, {"source": SEES + " "}, {"scalars": {"x": int}}):
        assert variant(**other) != variant()
    assert variant(scalars={"x": int}) != variant(scalars={"x": float})


def run_single(checked: fi.AttentionVariant, *values: Any, **options: Any) -> Any:
    q, kv = torch.zeros(1, 4, 64), torch.zeros(5, 4, 64)
    function = fi.single_prefill_with_kv_cache_with_jit_module
    return function(checked, q, kv, kv, *values, **options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "\n  int x = 1;\n  oops"}, r"checked:3:"),  # the user's own line
        ({"source": "int helper() { return 1; }"}, "a variant has at least one of logit"),
        ({"use_softmax": False}, r"weight\(\) takes the place of softmax"),
        ({"source": "FI_HOST_DEVICE float logit(double) const { return 0; }"}, "logit"),
        (
            {"source": f"static constexpr int kKeysSeenTogether = 0; {SEES}"},
            "kKeysSeenTogether is a number of keys",
        ),
    ],
)
def test_sources_that_do_not_compile(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        run_single(variant(**fields))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ((), ValueError, r"distance_bias takes 1 values \(slopes\); got 0"),
        ((torch.zeros(4), 1.0), ValueError, "got 2"),
        ((1.0,), TypeError, "slopes must be a torch.Tensor; got float"),
        ((torch.zeros(4).half(),), TypeError, "slopes: dtype must be float32, got float16"),
        ((torch.zeros(8)[::2],), ValueError, "slopes: must be contiguous"),
    ],
)
def test_values_that_do_not_fit(
    values: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_single(BIAS, *values)


def test_scalars_that_do_not_fit() -> None:
    with pytest.raises(TypeError, match="bias must be a number, float; got str"):
        run_single(SIGMOID, "0.5")
    counting = variant(source=SEES, scalars={"count": int})
    with pytest.raises(TypeError, match="count must be a number, int; got float"):
        run_single(counting, 0.5)
    with pytest.raises(ValueError, match="count: must fit 32 bits, got 4294967296"):
        run_single(counting, 2**32)


def make_layer(**fields: Any) -> tuple[fi.PagedAttention, Any, torch.Tensor, Any]:
    spec = fi.AttentionSpec(
        num_qo_heads=4, num_kv_heads=4, head_dim_qk=64, q_dtype=torch.float32, **fields
    )
    ends = torch.tensor([0, 5], dtype=torch.int32)
    step = fi.plan(spec, fi.PagedBatch.ragged(ends // 5, ends), fi.Workspace())
    kv = torch.zeros(5, 1, 4, 64)
    return fi.PagedAttention(spec), step, torch.zeros(1, 4, 64), (kv, kv)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "distance_bias takes slopes; got no slopes"),
        ({"slope": 1.0}, "got no slopes and unknown slope"),
        ({"slopes": torch.zeros(4), "x": 1}, "got unknown x"),
    ],
)
def test_names_that_do_not_fit(values: dict[str, Any] | None, message: str) -> None:
    layer, *arguments = make_layer(variant=BIAS)
    with pytest.raises(ValueError, match=message):
        layer.run(*arguments, variant_values=values)


def test_values_without_a_variant() -> None:
    layer, *arguments = make_layer()
    with pytest.raises(ValueError, match="variant_values must be None"):
        layer.run(*arguments, variant_values={"slopes": torch.zeros(4)})


def test_what_variants_do_not_have() -> None:
    with pytest.raises(UnsupportedError, match=r"alibi must be False .* logit\(\)"):
        make_layer(variant=BIAS, alibi=True)
    with pytest.raises(UnsupportedError, match="sinks must be False"):
        make_layer(variant=SIGMOID, sinks=True)
    with pytest.raises(ValueError, match="return_lse must be None and False: variant sigmoid"):
        run_single(SIGMOID, 0.0, return_lse=True)
    with pytest.raises(ValueError, match="mask_mode must be 0"):
        run_single(BIAS, torch.zeros(4), mask_mode=2)
    with pytest.raises(TypeError, match=r"jit_module must be a fi_backend\.AttentionVariant"):
        run_single("sigmoid")  # type: ignore[arg-type]
    layer, step, q, cache = make_layer(variant=BIAS)
    with pytest.raises(UnsupportedError, match=r"torch\.compiler\.disable"):
        layer.run(step, q.to("meta"), cache, variant_values={"slopes": torch.zeros(4)})


def test_wrappers_take_one_variant_and_nothing_else() -> None:
    for jit_args in ([], [BIAS, BIAS], ["uri", torch.float16], BIAS):
        with pytest.raises(UnsupportedError, match=r"jit_args must be \[fi_backend.Attention"):
            decode_wrapper(jit_args=jit_args)
    with pytest.raises(UnsupportedError, match="jit_kwargs"):
        prefill_wrapper(jit_args=[BIAS], jit_kwargs={"use_sliding_window": True})


def test_wrappers_without_a_variant_take_no_values() -> None:
    case = make_case([1], [20])
    table = case.paged(16)
    for wrapper, plan in ((decode_wrapper(), plan_decode), (prefill_wrapper(), plan_prefill)):
        plan(wrapper, case, table, 16)
        with pytest.raises(UnsupportedError, match="args"):
            wrapper.run(case.rows, table.cache, torch.zeros(4))
