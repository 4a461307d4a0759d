"""Custom attention variants: the examples of docs/attention-variants.md on every path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from variant_examples import EXAMPLES, Example, Request, Values
from variant_examples import expected as expected_of
from wrapper_cases import (
    Case,
    assert_out,
    assert_state,
    decode_wrapper,
    make_case,
    plan_decode,
    plan_prefill,
    prefill_wrapper,
    workspace,
)

import fi_backend as fi

PAGE_SIZE = 16
HEADS = (6, 2)
DISTANCE_BIAS, SIGMOID = EXAMPLES["distance_bias"].variant, EXAMPLES["sigmoid"].variant

every_example = pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)


def expected(
    case: Case, example: Example, values: Values, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return expected_of(zip(case.q, case.k, case.v, strict=True), example, values, **options)


def check(example: Example, run: Callable[..., Any], state: tuple[torch.Tensor, ...]) -> None:
    """Compare run(return_lse=...) with the reference; there is no lse without softmax."""
    if example.uses_softmax:
        assert_state(run(return_lse=True), state)  # type: ignore[arg-type]
    else:
        assert_out(run(return_lse=False), state[0])


def in_order(example: Example, values: Values) -> Sequence[Any]:
    return tuple(values.values())


# Steps with every kind of request: long ones that are split, rows that see no key, none at all.
DECODE_LENS = ([300, 1, 0, 64, 777], [3000])
PREFILL_STEPS = (([70, 1, 0, 5, 3, 33], [200, 300, 64, 2, 0, 33]), ([130], [900]))


@every_example
@pytest.mark.parametrize("kv_lens", DECODE_LENS, ids=str)
@pytest.mark.parametrize("options", [{}, {"fixed_split_size": 2}], ids=["free", "split"])
def test_paged_decode(
    device: str, example: Example, kv_lens: list[int], options: dict[str, int]
) -> None:
    case = make_case([1] * len(kv_lens), kv_lens, heads=HEADS)
    values = example.make_values(HEADS[0], len(kv_lens), max(kv_lens))
    table = case.paged(PAGE_SIZE)
    wrapper = decode_wrapper(jit_args=[example.variant], use_tensor_cores=True)
    plan_decode(wrapper, case, table, PAGE_SIZE, **options)

    def run(**kwargs: bool) -> Any:
        return wrapper.run(case.rows, table.cache, *in_order(example, values), **kwargs)

    check(example, run, expected(case, example, values))


@every_example
@pytest.mark.parametrize("lens", PREFILL_STEPS, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_paged_prefill(
    device: str, example: Example, lens: tuple[list[int], list[int]], causal: bool
) -> None:
    case = make_case(*lens, heads=HEADS)
    values = example.make_values(HEADS[0], len(lens[0]), max(lens[1]))
    table = case.paged(PAGE_SIZE, "HND")
    wrapper = prefill_wrapper(jit_args=[example.variant], kv_layout="HND")
    plan_prefill(wrapper, case, table, PAGE_SIZE, causal=causal)

    def run(**kwargs: bool) -> Any:
        return wrapper.run(case.rows, table.cache, *in_order(example, values), **kwargs)

    check(example, run, expected(case, example, values, causal=causal))


@every_example
def test_ragged_prefill(device: str, example: Example) -> None:
    case = make_case(*PREFILL_STEPS[0], heads=HEADS)
    values = example.make_values(HEADS[0], len(case.q), max(PREFILL_STEPS[0][1]))
    wrapper = fi.BatchPrefillWithRaggedKVCacheWrapper(workspace(), jit_args=[example.variant])
    dtype = case.rows.dtype
    wrapper.plan(case.qo_indptr, case.kv_indptr, *case.heads, causal=True, q_data_type=dtype)

    def run(**kwargs: bool) -> Any:
        return wrapper.run(case.rows, *case.ragged(), *in_order(example, values), **kwargs)

    check(example, run, expected(case, example, values))


@every_example
def test_one_request(device: str, example: Example) -> None:
    case = make_case([90], [250], heads=HEADS)
    values = example.make_values(HEADS[0], 1, 250)
    arguments = (example.variant, case.q[0], case.k[0], case.v[0], *in_order(example, values))
    prefill = fi.single_prefill_with_kv_cache_with_jit_module
    check(
        example,
        lambda **kwargs: prefill(*arguments, mask_mode=1, **kwargs),
        expected(case, example, values),
    )
    case = make_case([1], [250], heads=HEADS)
    arguments = (example.variant, case.rows[0], case.k[0], case.v[0], *in_order(example, values))
    out = fi.single_decode_with_kv_cache_with_jit_module(*arguments)
    assert_out(out[None], expected(case, example, values)[0])


def test_fp8_cache(device: str) -> None:
    case = make_case([1, 40], [200, 90], heads=HEADS, kv_dtype=torch.float8_e4m3fn)
    example = EXAMPLES["sigmoid"]
    table = case.paged(PAGE_SIZE)
    wrapper = prefill_wrapper(jit_args=[SIGMOID])
    plan_prefill(wrapper, case, table, PAGE_SIZE, causal=True)
    out = wrapper.run(case.rows, table.cache, -1.0, k_scale=0.5, v_scale=2.0)
    scaled = Case(case.q, [k.double() * 0.5 for k in case.k], [v.double() * 2.0 for v in case.v])
    assert_out(out, expected(scaled, example, {"bias": -1.0})[0])


def test_options_of_the_layer_hold_besides(device: str) -> None:
    """The soft cap comes before logit(); masks, sinks and windows are those of the layer."""
    case = make_case([30, 4], [100, 200], heads=HEADS)
    example = EXAMPLES["distance_bias"]
    values = example.make_values(HEADS[0], 2, 200)
    table = case.paged(PAGE_SIZE)
    sinks = torch.randn(HEADS[0])
    masks = [torch.rand(30, 100) < 0.5, torch.rand(4, 200) < 0.5]
    wrapper = prefill_wrapper(jit_args=[DISTANCE_BIAS])
    flat = torch.cat([mask.flatten() for mask in masks])
    options = {"custom_mask": flat, "logits_soft_cap": 2.0}
    plan_prefill(wrapper, case, table, PAGE_SIZE, **options)
    got = wrapper.run(case.rows, table.cache, values["slopes"], sinks=sinks, return_lse=True)
    state = expected(
        case, example, values, causal=False, custom_mask=masks, sinks=sinks, soft_cap=2.0
    )
    assert_state(got, state)  # type: ignore[arg-type]


STRIPES = fi.AttentionVariant(
    "stripes",
    """
    static constexpr int kKeysSeenTogether = 24;

    FI_HOST_DEVICE bool sees(const Pair& at) const {
      return (at.kv_idx / 24 + at.qo_idx) % 3 != 0;
    }
    """,
)


@pytest.mark.parametrize("page_size", [1, PAGE_SIZE])
def test_keys_seen_together(device: str, page_size: int) -> None:
    """Blocks of keys that a GPU's tiles, which begin at a window's edge, cut anywhere."""
    window = 100

    def score(
        logits: torch.Tensor, request: Request, _values: Values
    ) -> tuple[torch.Tensor, torch.Tensor | bool]:
        row = request.position - request.position[0]
        seen = (request.key // 24 + row) % 3 != 0
        return logits, seen & (request.key >= request.position - window)

    case = make_case([70, 1, 40, 33], [500, 300, 64, 33], heads=HEADS)
    table = case.paged(page_size)
    wrapper = prefill_wrapper(jit_args=[STRIPES])
    plan_prefill(wrapper, case, table, page_size, causal=True, window_left=window)
    got = wrapper.run(case.rows, table.cache, return_lse=True)
    assert_state(got, expected(case, Example(STRIPES, lambda *_: {}, score), {}))


GATED = fi.AttentionVariant(
    "gated",
    """
    FI_HOST_DEVICE float output(float value, const Row& row, int dim) const {
      return value * gates[(row.qo_row * num_heads + row.qo_head) * head_dim + dim];
    }
    """,
    tensors={"gates": torch.float32},
    scalars={"num_heads": int, "head_dim": int},
)


@pytest.mark.parametrize("lens", [([1, 1], [3000, 20]), PREFILL_STEPS[0]], ids=str)
def test_output(device: str, lens: tuple[list[int], list[int]]) -> None:
    """Elements, rows and heads get what is theirs, merged or not."""
    case = make_case(*lens, heads=HEADS)
    gates = torch.rand(len(case.rows), HEADS[0], case.head_dim)
    table = case.paged(PAGE_SIZE)
    wrapper = prefill_wrapper(jit_args=[GATED])
    plan_prefill(wrapper, case, table, PAGE_SIZE, causal=True)
    got = wrapper.run(case.rows, table.cache, gates, HEADS[0], case.head_dim)
    assert_out(got, case.expected(causal=True)[0] * gates.double())


PLACES = fi.AttentionVariant(
    "places",
    """
    FI_HOST_DEVICE float weight(float, const Pair& at) const {
      const float places[] = {float(at.request), float(at.qo_row), float(at.qo_idx),
                              float(at.kv_idx), float(at.qo_len), float(at.kv_len),
                              float(at.qo_head), float(at.kv_head), float(at.distance())};
      return places[which] * 0.0625f;
    }
    """,
    scalars={"which": int},
    use_softmax=False,
)


def test_every_place_is_told_right(device: str) -> None:
    """Sums over the keys of what weight() is told."""
    case = make_case([3, 1, 20], [20, 90, 40], heads=HEADS)
    ones = Case(case.q, case.k, [torch.ones_like(v) for v in case.v])
    table = ones.paged(PAGE_SIZE)
    wrapper = prefill_wrapper(jit_args=[PLACES])
    plan_prefill(wrapper, ones, table, PAGE_SIZE)
    for which in range(9):
        out = wrapper.run(ones.rows, table.cache, which)
        for request, q in enumerate(ones.q):
            first, kv_len = int(ones.qo_indptr[request]), len(ones.k[request])
            for i in range(len(q)):
                for head in range(HEADS[0]):
                    key = torch.arange(kv_len).double()
                    places: list[Any] = [request, first + i, i, key, len(q), kv_len, head]
                    places += [head // 3, kv_len - len(q) + i - key]
                    total = (places[which] + 0 * key).sum() / 16
                    torch.testing.assert_close(
                        out[first + i, head].double(),
                        total.expand(case.head_dim),
                        rtol=0.01,
                        atol=0.01,
                    )


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@every_example
def test_a_captured_run_follows_plans_and_tensors(device: str, example: Example) -> None:
    kv_lens = [300, 64, 1, 17]
    case = make_case([1] * 4, kv_lens, heads=HEADS)
    values = example.make_values(HEADS[0], 4, 300)
    pool = tuple(torch.empty(100, PAGE_SIZE, HEADS[1], 64).bfloat16() for _ in "kv")
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(
        workspace(),
        use_cuda_graph=True,
        paged_kv_indptr_buffer=torch.empty(5, dtype=torch.int32),
        paged_kv_indices_buffer=torch.empty(100, dtype=torch.int32),
        paged_kv_last_page_len_buffer=torch.empty(4, dtype=torch.int32),
        jit_args=[example.variant],
    )
    q, out = torch.empty_like(case.rows), torch.empty_like(case.rows)

    def load(case: Case) -> None:
        table = case.paged(PAGE_SIZE)
        for into, cache in zip(pool, table.cache, strict=True):
            into.fill_(float("nan"))
            into[: cache.shape[0]] = cache
        q.copy_(case.rows)
        plan_decode(wrapper, case, table, PAGE_SIZE)

    load(case)
    wrapper.run(q, pool, *in_order(example, values), out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        wrapper.run(q, pool, *in_order(example, values), out=out)
    for lens in (kv_lens, [0, 299, 5, 200]):
        case = make_case([1] * 4, lens, heads=HEADS)
        for name, value in example.make_values(HEADS[0], 4, 300).items():
            if isinstance(value, torch.Tensor):
                values[name].copy_(value)
        load(case)
        graph.replay()
        assert_out(out, expected(case, example, values)[0])


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_a_tensor_elsewhere_is_refused(device: str) -> None:
    case = make_case([1], [20], heads=HEADS)
    slopes = torch.zeros(HEADS[0], device="cpu")
    arguments = (DISTANCE_BIAS, case.rows[0], case.k[0], case.v[0], slopes)
    with pytest.raises(ValueError, match="slopes: must be on device cuda:0, got cpu"):
        fi.single_decode_with_kv_cache_with_jit_module(*arguments)
