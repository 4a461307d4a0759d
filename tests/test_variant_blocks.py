"""Masks in blocks, whose keys that nobody sees are left out: every path, against float64.

Keys that no row of a request sees are NaN in the caches: what is left out does not reach outputs.
"""

from __future__ import annotations

import faulthandler
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from variant_examples import Example, Request, Values, expected
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

SIZES = (32, 64, 128, 256)
DENSITIES = (0.0, 0.2, 0.5, 1.0)
PAGE_SIZES = (1, 16, 64)
HEADS = (6, 2)
# Requests of several query tiles, with rows that see nothing, with more queries than keys.
PREFILL_LENS = ([150, 1, 70, 3, 0], [700, 300, 70, 2, 9])
DECODE_LENS = [900, 1, 0, 64, 333]

_SEES = """
static constexpr int kBlock = {size};
static constexpr int kKeysSeenTogether = kBlock;
static constexpr int kQueriesSeeAlike = kBlock;

FI_HOST_DEVICE bool sees(const Pair& at) const {{
  const int row = at.position() > 0 ? at.position() / kBlock : 0;
  const int table = (at.request * num_heads + at.qo_head) * num_blocks;
  return blocks[(table + row) * num_blocks + at.kv_idx / kBlock];
}}
"""
_MEMBERS: dict[str, Any] = {
    "tensors": {"blocks": torch.bool},  # [num_requests, num_heads, num_blocks, num_blocks]
    "scalars": {"num_heads": int, "num_blocks": int},
}
_SIGMOID = """
FI_HOST_DEVICE float weight(float logit, const Pair&) const { return fast_sigmoid(logit); }
"""


@cache
def block_mask(size: int, *, uses_softmax: bool = True) -> fi.AttentionVariant:
    source = _SEES.format(size=size) + ("" if uses_softmax else _SIGMOID)
    return fi.AttentionVariant(f"blocks_of_{size}", source, use_softmax=uses_softmax, **_MEMBERS)


@dataclass(frozen=True)
class Masked:
    """A case with a mask of blocks, and the same case with NaN where nobody sees a key."""

    example: Example
    case: Case
    poisoned: Case
    values: Values

    def expected(self, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        requests = zip(self.case.q, self.case.k, self.case.v, strict=True)
        return expected(requests, self.example, self.values, **options)

    @property
    def in_order(self) -> tuple[Any, ...]:
        return tuple(self.values.values())


def make_masked(
    qo_lens: list[int],
    kv_lens: list[int],
    size: int,
    density: float,
    *,
    heads: tuple[int, int] = HEADS,
    uses_softmax: bool = True,
    **options: Any,
) -> Masked:
    """Draw a mask for each head; a third of the key blocks is hidden from all of them."""
    case = make_case(qo_lens, kv_lens, heads=heads, **options)
    num_blocks = -(-max(*kv_lens, 1) // size)
    shape = (len(qo_lens), heads[0], num_blocks, num_blocks)
    blocks = torch.rand(shape) < density
    is_hidden = torch.rand(len(qo_lens), num_blocks) < (1 / 3 if density < 1 else 0)
    blocks &= ~is_hidden[:, None, None]
    nobody_sees = ~blocks.any(1).any(1)

    def poison(rows: list[torch.Tensor]) -> list[torch.Tensor]:
        poisoned = []
        for request, row in enumerate(rows):
            hides = nobody_sees[request].repeat_interleave(size)[: len(row), None, None]
            poisoned.append(row.float().masked_fill(hides, float("nan")).to(row.dtype))
        return poisoned

    def score(
        logits: torch.Tensor, request: Request, values: Values
    ) -> tuple[torch.Tensor, torch.Tensor | bool]:
        own = values["blocks"][request.index]
        row, key = request.position.clamp(min=0) // size, request.key // size
        return logits if uses_softmax else torch.sigmoid(logits), own[:, row, key]

    values = {"blocks": blocks, "num_heads": heads[0], "num_blocks": num_blocks}
    variant = block_mask(size, uses_softmax=uses_softmax)
    poisoned = Case(case.q, poison(case.k), poison(case.v))
    return Masked(Example(variant, lambda *_: values, score), case, poisoned, values)


def await_kernels(device: str) -> None:
    """Wait for a GPU; a kernel that hangs takes the process with it."""
    if device != "cuda":
        return
    faulthandler.dump_traceback_later(20, exit=True)
    torch.cuda.synchronize()
    faulthandler.cancel_dump_traceback_later()


def check_prefill(
    device: str, masked: Masked, page_size: int, *, window_left: int = -1, **plan_options: Any
) -> None:
    table = masked.poisoned.paged(page_size)
    wrapper = prefill_wrapper(jit_args=[masked.example.variant])
    causal = plan_options.setdefault("causal", True)
    plan_prefill(wrapper, masked.case, table, page_size, window_left=window_left, **plan_options)
    uses_softmax = masked.example.uses_softmax
    got = wrapper.run(masked.case.rows, table.cache, *masked.in_order, return_lse=uses_softmax)
    await_kernels(device)
    state = masked.expected(causal=causal, window_left=window_left)
    if uses_softmax:
        assert_state(got, state)  # type: ignore[arg-type]
    else:
        assert_out(got, state[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("size", SIZES)
def test_prefill(device: str, size: int, density: float, page_size: int) -> None:
    check_prefill(device, make_masked(*PREFILL_LENS, size, density), page_size)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("size", SIZES)
def test_decode(device: str, size: int, density: float, page_size: int) -> None:
    masked = make_masked([1] * len(DECODE_LENS), DECODE_LENS, size, density)
    table = masked.poisoned.paged(page_size)
    wrapper = decode_wrapper(jit_args=[masked.example.variant], use_tensor_cores=True)
    plan_decode(wrapper, masked.case, table, page_size)
    got = wrapper.run(masked.case.rows, table.cache, *masked.in_order, return_lse=True)
    await_kernels(device)
    assert_state(got, masked.expected())


@pytest.mark.parametrize(
    "lens", [PREFILL_LENS, ([40, 1, 1, 1], [2000, 900, 64, 500])], ids=["many", "both lines"]
)
@pytest.mark.parametrize("heads", [(4, 4), (8, 1), (5, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_heads(
    device: str, lens: tuple[list[int], list[int]], heads: tuple[int, int], head_dim: int
) -> None:
    masked = make_masked(*lens, 64, 0.4, heads=heads, head_dim=head_dim)
    check_prefill(device, masked, 16, causal=False)


@pytest.mark.parametrize("window", [0, 77, 300])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_windows(device: str, page_size: int, window: int) -> None:
    check_prefill(device, make_masked(*PREFILL_LENS, 64, 0.5), page_size, window_left=window)


@pytest.mark.parametrize("size", [32, 64])
def test_a_request_that_is_cut(device: str, size: int) -> None:
    """Parts of it see nothing."""
    masked = make_masked([40, 1], [5000, 6000], size, 0.3)
    masked.values["blocks"][..., 2500 // size :] = False
    check_prefill(device, masked, 16)


@pytest.mark.parametrize("page_size", [1, 16])
def test_fp8_caches(device: str, page_size: int) -> None:
    masked = make_masked(*PREFILL_LENS, 64, 0.4, head_dim=128, kv_dtype=torch.float8_e4m3fn)
    check_prefill(device, masked, page_size)


def test_without_softmax(device: str) -> None:
    check_prefill(device, make_masked(*PREFILL_LENS, 64, 0.4, uses_softmax=False), 16)


def test_options_of_the_layer_hold_besides(device: str) -> None:
    masked = make_masked([90, 40], [300, 200], 64, 0.6)
    masks = [torch.rand(90, 300) < 0.5, torch.rand(40, 200) < 0.5]
    table = masked.poisoned.paged(16)
    wrapper = prefill_wrapper(jit_args=[masked.example.variant])
    flat = torch.cat([mask.flatten() for mask in masks])
    plan_prefill(wrapper, masked.case, table, 16, custom_mask=flat, logits_soft_cap=3.0)
    got = wrapper.run(masked.case.rows, table.cache, *masked.in_order, return_lse=True)
    await_kernels(device)
    assert_state(got, masked.expected(causal=False, custom_mask=masks, soft_cap=3.0))


@pytest.mark.parametrize("density", DENSITIES)
def test_ragged(device: str, density: float) -> None:
    masked = make_masked(*PREFILL_LENS, 64, density)
    variant = masked.example.variant
    wrapper = fi.BatchPrefillWithRaggedKVCacheWrapper(workspace(), jit_args=[variant])
    case = masked.case
    wrapper.plan(
        case.qo_indptr, case.kv_indptr, *case.heads, causal=True, q_data_type=case.rows.dtype
    )
    got = wrapper.run(case.rows, *masked.poisoned.ragged(), *masked.in_order, return_lse=True)
    await_kernels(device)
    assert_state(got, masked.expected())


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("density", [0.05, 1.0])
def test_more_tiles_than_are_listed(device: str, density: float) -> None:
    """Of 2344 tiles of 128 keys, the first ones are computed whoever sees them."""
    masked = make_masked([50], [300_000], 256, density, heads=(1, 1))
    masked.poisoned.k[0].nan_to_num_()
    masked.poisoned.v[0].nan_to_num_()
    check_prefill(device, masked, 64)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_many_units_a_block(device: str, page_size: int) -> None:
    """Blocks of threads go from units with tiles to units without any and back."""
    masked = make_masked([1500, 600, 1, 1], [1500, 900, 700, 5], 64, 0.3, heads=(16, 4))
    masked.values["blocks"][:, :, ::3] = False
    check_prefill(device, masked, page_size)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("head_dim", [160, 256])
def test_other_kernels(device: str, head_dim: int, page_size: int) -> None:
    """Heads of 160 take the portable kernel, wide ones tiles of 64 tokens in two stages."""
    check_prefill(device, make_masked(*PREFILL_LENS, 64, 0.4, head_dim=head_dim), page_size)
