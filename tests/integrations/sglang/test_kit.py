"""SGLang's own attention tests (sglang.test.kits.attention_unittest) on our backend."""

from __future__ import annotations

import unittest
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from sglang.srt.layers import radix_attention
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.utils import common
from sglang.test.kits.attention_unittest.attention_methods import dense_attention as dense
from sglang.test.kits.attention_unittest.runner_modes import (
    cuda_graph_decode_runner as decode_graph,
)
from sglang.test.kits.attention_unittest.runner_modes import (
    speculative_draft_extend_runner as draft_extend,
)
from sglang.test.kits.attention_unittest.runner_modes import (
    speculative_draft_runner as draft,
)
from sglang.test.kits.attention_unittest.runner_modes import (
    speculative_target_verify_runner as verify,
)
from sglang.test.kits.attention_unittest.runner_modes import split_op_runner as split_op

NAME = "fi_backend"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PAGES = [1, 16, 32]
HEADS = [(4, 4), (4, 2), (4, 1)]
WINDOWS = [None, 4]
LAYOUTS = ["contiguous", "shuffled_pages", "interleaved_pages", "non_monotonic_extend"]
SIZES = {"head_dim": 64, "hidden_size": 256}
DENSE_CASES = (
    *dense.make_dense_cases(NAME),
    *dense.make_swa_no_prefix_input_config_cases(NAME),
    *dense.make_swa_prefix_input_config_cases(NAME),
)
VERIFIERS = [("eagle", 1), ("eagle", 2), ("frozen_kv_mtp", 2), ("dflash", 1), ("ngram", 1)]


@pytest.fixture(autouse=True)
def _window_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kit asks by name whether a window includes the token itself; ours does not count it."""
    names = dense._SWA_DECODE_EXTEND_WINDOW | {NAME}
    monkeypatch.setattr(dense, "_SWA_DECODE_EXTEND_WINDOW", names)


@pytest.fixture(scope="module", autouse=True)
def _split_op_on_the_cpu() -> None:
    """SGLang registers the operation that splits its graphs for CUDA alone."""
    if torch.cuda.is_available():
        return

    def operation(*arguments: Any, use_mha_companion: bool = False, **options: Any) -> None:
        radix_attention._unified_attention_with_output_impl(
            *arguments, use_mha_companion, False, **options
        )

    common.sglang_lib.impl("unified_attention_with_output", operation, "CPU")


def make(
    mode: ForwardMode, heads: tuple[int, int], page: int, window: int | None, **lens: Any
) -> dense.DenseAttentionCase:
    return dense.DenseAttentionCase(
        name=f"{mode.name.lower()}_{heads}_{page}_{window}",
        backend=NAME,
        forward_mode=mode,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        page_size=page,
        sliding_window_size=window,
        **lens,
    )


def make_contiguous(runner: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lay out tokens one after the other: there this part of the kit writes prefixes anyway."""

    def build(*args: Any, **kwargs: Any) -> Any:
        return dense.build_dense_attention_fixture(*args, loc_layout="contiguous", **kwargs)

    monkeypatch.setattr(runner, "build_dense_attention_fixture", build)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("dense_case", DENSE_CASES, ids=lambda case: case.name)
def test_dense(
    dense_case: dense.DenseAttentionCase,
    page: int,
    layout: str,
    device: str,
    case: unittest.TestCase,
) -> None:
    if layout == "non_monotonic_extend" and page > 1:
        pytest.skip("it scatters the tokens of a page, which SGLang's allocators never do")
    dense.run_dense_attention_case(
        case, replace(dense_case, page_size=page), device=device, loc_layout=layout, **SIZES
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("heads", HEADS)
def test_decode_graph(
    heads: tuple[int, int], page: int, window: int | None, device: str, case: unittest.TestCase
) -> None:
    step = make(ForwardMode.DECODE, heads, page, window, prefix_lens=(14, 15, 16))
    decode_graph.run_dense_cuda_graph_decode_case(case, step, device=device, **SIZES)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_tokens", [None, 40])
@pytest.mark.parametrize("breakable", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("heads", HEADS[1:])
def test_split_op(
    heads: tuple[int, int],
    page: int,
    window: int | None,
    breakable: bool,
    num_tokens: int | None,
    device: str,
    case: unittest.TestCase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if page == 1:
        make_contiguous(split_op, monkeypatch)
    lens = {"prefix_lens": (0, 8, 16), "extend_lens": (15, 8, 1)}
    step = make(ForwardMode.EXTEND, heads, page, window, **lens)
    split_op.run_dense_split_op_extend_case(
        case,
        step,
        breakable=breakable,
        static_num_tokens=num_tokens,
        device=device,
        **SIZES,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize(("kind", "topk"), VERIFIERS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_verify(
    heads: tuple[int, int],
    page: int,
    window: int | None,
    kind: str,
    topk: int,
    in_graph: bool,
    device: str,
    case: unittest.TestCase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if page == 1:
        make_contiguous(verify, monkeypatch)
    lens = {"prefix_lens": (3, 15, 16), "extend_lens": (3, 3, 3)}
    step = make(ForwardMode.TARGET_VERIFY, heads, page, window, **lens)
    run = verify.run_dense_spec_verify_case
    if in_graph:
        run = verify.run_dense_spec_verify_cuda_graph_case
    run(case, step, topk=topk, spec_kind=kind, device=device, **SIZES)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pad_style", ["small_real", "prod_fill"])
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("heads", HEADS)
def test_draft_extend(
    heads: tuple[int, int], page: int, pad_style: str, device: str, case: unittest.TestCase
) -> None:
    lens = {"prefix_lens": (3, 15, 16), "extend_lens": (3, 3, 3)}
    step = make(ForwardMode.DRAFT_EXTEND_V2, heads, page, None, **lens)
    draft_extend.run_dense_draft_extend_v2_cuda_graph_case(
        case, step, pad_style=pad_style, device=device, **SIZES
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("page", "topk"), [(1, 1), (1, 2), (16, 1)])
@pytest.mark.parametrize("heads", HEADS)
def test_draft_steps_in_a_graph(
    heads: tuple[int, int], page: int, topk: int, case: unittest.TestCase
) -> None:
    step = make(ForwardMode.DECODE, heads, page, None, prefix_lens=(3, 15, 16))
    draft.run_dense_eagle_draft_cuda_graph_runner_case(case, step, topk=topk, **SIZES)


@pytest.mark.gpu
@pytest.mark.parametrize("page", PAGES)
def test_draft_extend_in_a_graph(page: int, case: unittest.TestCase) -> None:
    lens = {"prefix_lens": (3, 15, 16), "extend_lens": (3, 3, 3)}
    step = make(ForwardMode.DRAFT_EXTEND_V2, (4, 2), page, None, **lens)
    draft_extend.run_dense_eagle_draft_extend_v2_cuda_graph_runner_case(case, step, **SIZES)
