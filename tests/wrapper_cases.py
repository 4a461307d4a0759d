"""Random batches for the FlashInfer-shaped wrappers, and what attention over them must give.

Tensors are made on torch's default device, which the `device` fixture sets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from paged_kv import paged_kv
from reference import Mask, attention

import fi_backend as fi
from tests.tolerance import assert_accurate, assert_lse_accurate

WORKSPACE_BYTES = 1 << 20
# One `device` serves all examples of a property: nothing of it changes between them.
random_examples = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# The marks of a file whose tests all need a GPU, and make their tensors there.
ON_CUDA = [
    pytest.mark.usefixtures("device"),
    pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True),
]


def default_dtype() -> torch.dtype:
    """float32, or bfloat16 on a GPU, whose kernels take 16-bit queries."""
    on_host = torch.get_default_device().type == "cpu"
    return torch.float32 if on_host else torch.bfloat16


def workspace() -> torch.Tensor:
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8)


def int32(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def offsets(lens: Sequence[int]) -> torch.Tensor:
    return int32([sum(lens[:i]) for i in range(len(lens) + 1)])


@dataclass(frozen=True)
class PagedTable:
    """A cache whose unread pages and page tails are NaN, and the CSR table that finds the rest."""

    cache: Any
    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor

    def to(self, device: str) -> PagedTable:
        """Move the table, but not the cache."""
        table = (self.indptr, self.indices, self.last_page_len)
        return PagedTable(self.cache, *(tensor.to(device) for tensor in table))


@dataclass(frozen=True)
class Case:
    """Requests with their queries, keys and values, dense: [len, heads, head_dim] each."""

    q: list[torch.Tensor]
    k: list[torch.Tensor]
    v: list[torch.Tensor]

    @property
    def num_qo_heads(self) -> int:
        return self.q[0].shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.k[0].shape[1]

    @property
    def head_dim(self) -> int:
        return self.q[0].shape[2]

    @property
    def rows(self) -> torch.Tensor:
        return torch.cat(self.q)

    @property
    def qo_indptr(self) -> torch.Tensor:
        return offsets([len(q) for q in self.q])

    @property
    def kv_indptr(self) -> torch.Tensor:
        return offsets([len(k) for k in self.k])

    @property
    def heads(self) -> tuple[int, int, int]:
        return self.num_qo_heads, self.num_kv_heads, self.head_dim

    def paged(
        self,
        page_size: int,
        kv_layout: str = "NHD",
        form: str = "pair",
        unreadable: list[int] | None = None,
    ) -> PagedTable:
        """Scatter keys and values over shuffled pages.

        Args:
            page_size: tokens per page.
            kv_layout: "NHD" or "HND".
            form: "pair", or "one" for a tensor of 5 dimensions.
            unreadable: as for paged_kv.
        """
        kv = paged_kv(self.k, self.v, page_size, layout=kv_layout, unreadable=unreadable)
        cache = (kv.k_cache, kv.v_cache)
        if kv_layout == "HND":
            cache = (kv.k_cache.transpose(1, 2), kv.v_cache.transpose(1, 2))
        last_page_len = kv.kv_lens - (kv.page_indptr.diff() - 1).clamp(min=0) * page_size
        return PagedTable(
            torch.stack(cache, dim=1) if form == "one" else cache,
            kv.page_indptr,
            kv.page_indices,
            last_page_len,
        )

    def ragged(self, kv_layout: str = "NHD") -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all requests, one after the other."""
        k, v = torch.cat(self.k), torch.cat(self.v)
        if kv_layout == "HND":
            return k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()
        return k, v

    def expected(
        self,
        *,
        sm_scale: float | None = None,
        custom_mask: list[torch.Tensor] | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and base-2 lse of every row, in float64; options as those of Mask."""
        scale = 1 / math.sqrt(self.head_dim) if sm_scale is None else sm_scale
        states = [
            attention(
                q,
                k,
                v,
                Mask(custom_mask=None if custom_mask is None else custom_mask[i], **options),
                sm_scale=scale,
            )
            for i, (q, k, v) in enumerate(zip(self.q, self.k, self.v, strict=True))
        ]
        return torch.cat([out for out, _ in states]), torch.cat([lse for _, lse in states])


def make_case(
    qo_lens: Sequence[int],
    kv_lens: Sequence[int],
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    head_dim_vo: int | None = None,
    dtype: torch.dtype | None = None,
    kv_dtype: torch.dtype | None = None,
) -> Case:
    num_qo_heads, num_kv_heads = heads
    dtype = default_dtype() if dtype is None else dtype

    def make(length: int, count: int, dim: int, kind: torch.dtype) -> torch.Tensor:
        return torch.randn(length, count, dim).to(kind)

    kv = dtype if kv_dtype is None else kv_dtype
    vo = head_dim if head_dim_vo is None else head_dim_vo
    return Case(
        q=[make(n, num_qo_heads, head_dim, dtype) for n in qo_lens],
        k=[make(n, num_kv_heads, head_dim, kv) for n in kv_lens],
        v=[make(n, num_kv_heads, vo, kv) for n in kv_lens],
    )


def assert_out(out: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Compare outputs with the reference; `tolerance` is that of float32."""
    assert out.shape == expected.shape
    if out.dtype == torch.float32:
        torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    else:
        assert_accurate(out, expected, expected.to(out.dtype))


def assert_state(
    got: tuple[torch.Tensor, torch.Tensor],
    expected: tuple[torch.Tensor, torch.Tensor],
    tolerance: float = 1e-5,
) -> None:
    """Compare (out, lse) with the reference; rows without keys must be exactly (0, -inf)."""
    (out, lse), (out_ref, lse_ref) = got, expected
    assert lse.shape == lse_ref.shape
    assert lse.dtype == torch.float32
    assert_out(out, out_ref, tolerance)
    if out.dtype == torch.float32:
        torch.testing.assert_close(lse.double(), lse_ref, atol=10 * tolerance, rtol=tolerance)
    else:
        assert_lse_accurate(lse, lse_ref)
    empty = torch.isinf(lse_ref)
    assert torch.equal(torch.isinf(lse), empty)
    assert not out[empty].any()


def decode_wrapper(**kwargs: Any) -> fi.BatchDecodeWithPagedKVCacheWrapper:
    return fi.BatchDecodeWithPagedKVCacheWrapper(workspace(), **kwargs)


def plan_decode(
    wrapper: fi.BatchDecodeWithPagedKVCacheWrapper,
    case: Case,
    table: PagedTable,
    page_size: int,
    **options: Any,
) -> None:
    options = {"q_data_type": case.q[0].dtype, "kv_data_type": case.k[0].dtype, **options}
    wrapper.plan(
        table.indptr, table.indices, table.last_page_len, *case.heads, page_size, **options
    )


def graph_decode_wrapper(
    batch_size: int, num_pages: int
) -> tuple[fi.CUDAGraphBatchDecodeWithPagedKVCacheWrapper, tuple[torch.Tensor, ...]]:
    """Make a wrapper and the buffers of its page table."""
    buffers = tuple(int32([-1] * size) for size in (batch_size + 1, num_pages, batch_size))
    wrapper = fi.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(
        workspace(), *buffers, use_tensor_cores=True
    )
    return wrapper, buffers


def prefill_wrapper(**kwargs: Any) -> fi.BatchPrefillWithPagedKVCacheWrapper:
    return fi.BatchPrefillWithPagedKVCacheWrapper(workspace(), **kwargs)


def prefill_buffers(batch_size: int, num_pages: int) -> dict[str, torch.Tensor]:
    """What a prefill wrapper with use_cuda_graph is given."""
    sizes = {
        "qo_indptr_buf": batch_size + 1,
        "paged_kv_indptr_buf": batch_size + 1,
        "paged_kv_indices_buf": num_pages,
        "paged_kv_last_page_len_buf": batch_size,
    }
    return {name: int32([-1] * size) for name, size in sizes.items()}


def plan_prefill(
    wrapper: fi.BatchPrefillWithPagedKVCacheWrapper,
    case: Case,
    table: PagedTable,
    page_size: int,
    **options: Any,
) -> None:
    """Plan with qo_indptr where the table is."""
    options = {"q_data_type": case.q[0].dtype, "kv_data_type": case.k[0].dtype, **options}
    wrapper.plan(
        case.qo_indptr.to(table.indptr.device),
        table.indptr,
        table.indices,
        table.last_page_len,
        *case.heads,
        page_size,
        **options,
    )


def pack_masks(masks: list[torch.Tensor]) -> torch.Tensor:
    """Pack boolean masks bit by bit, lowest first, each from a byte of its own."""
    packed = []
    for mask in masks:
        bits = mask.flatten().tolist()
        for at in range(0, len(bits), 8):
            packed.append(sum(bit << i for i, bit in enumerate(bits[at : at + 8])))
    return torch.tensor(packed, dtype=torch.uint8)
