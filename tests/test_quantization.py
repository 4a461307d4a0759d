"""fi_backend.quantization: bits against numpy's, segments, and errors."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import fi_backend
from fi_backend.kernels.packbits import pack_with_torch

bit_orders = pytest.mark.parametrize("bitorder", ["big", "little"])


def numpy_packbits(x: torch.Tensor, bitorder: str) -> torch.Tensor:
    return torch.from_numpy(np.packbits(x.numpy(), bitorder=bitorder))  # type: ignore[arg-type]


@bit_orders
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 64, 1003])
def test_packbits(size: int, bitorder: str) -> None:
    x = torch.rand(size) > 0.5
    assert torch.equal(fi_backend.packbits(x, bitorder), numpy_packbits(x, bitorder))


def test_packbits_default_is_big() -> None:
    assert fi_backend.packbits(torch.tensor([True, False, False])).tolist() == [128]


def test_packbits_takes_what_is_not_bool_or_not_contiguous() -> None:
    x = torch.tensor([2, 0, 0, 7, 0, 1], dtype=torch.int32)
    assert fi_backend.packbits(x, "little").tolist() == [0b101001]
    assert fi_backend.packbits(x[::3], "little").tolist() == [0b11]


@bit_orders
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_segment_packbits(bitorder: str, dtype: torch.dtype) -> None:
    sizes = [3, 0, 8, 17, 0, 100_000, 1]
    indptr = torch.tensor([0, *np.cumsum(sizes)], dtype=dtype)
    x = torch.rand(int(indptr[-1])) > 0.5
    packed, new_indptr = fi_backend.segment_packbits(x, indptr, bitorder)
    assert new_indptr.dtype == dtype
    expected = [numpy_packbits(part, bitorder) for part in x.split(sizes)]
    assert new_indptr.tolist() == [0, *np.cumsum([len(part) for part in expected])]
    assert torch.equal(packed, torch.cat(expected))


@bit_orders
def test_a_gpu_packs_with_torch(bitorder: str) -> None:
    """The code that serves CUDA tensors, here on the CPU; no value of its arguments is checked."""
    sizes = [0, 3, 0, 8, 17, 0, 100, 1, 0]
    begins = torch.tensor([0, *np.cumsum(sizes)])
    x = torch.rand(int(begins[-1])) > 0.5
    expected, bytes_of = fi_backend.segment_packbits(x, begins, bitorder)
    out = torch.full((len(expected) + 2,), 255, dtype=torch.uint8)
    options = {"out_indptr": bytes_of, "out": out, "little": bitorder == "little"}
    pack_with_torch(x=x, indptr=begins, **options)
    assert torch.equal(out, torch.cat((expected, expected.new_zeros(2))))
    pack_with_torch(x=x[:5], indptr=begins, **options)  # offsets past x are not read
    assert torch.equal(out[:1], expected[:1])


@pytest.mark.gpu
@bit_orders
@pytest.mark.parametrize("size", [0, 1, 8, 9, 1003])
def test_cuda_agrees_with_the_cpu(size: int, bitorder: str) -> None:
    x = torch.rand(3 * size) > 0.5
    assert torch.equal(
        fi_backend.packbits(x.cuda(), bitorder).cpu(), fi_backend.packbits(x, bitorder)
    )
    indptr = torch.tensor([0, size, size, 3 * size])
    here = fi_backend.segment_packbits(x, indptr, bitorder)
    there = fi_backend.segment_packbits(x.cuda(), indptr.cuda(), bitorder)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))
    with pytest.raises(ValueError, match="indptr must rise"):
        fi_backend.segment_packbits(x.cuda(), indptr.cuda() + 1)


def test_bad_arguments() -> None:
    x = torch.ones(10, dtype=torch.bool)
    with pytest.raises(ValueError, match="bitorder must be one of big, little; got 'middle'"):
        fi_backend.packbits(x, "middle")
    with pytest.raises(ValueError, match=r"x must have one dimension; got shape \[2, 5\]"):
        fi_backend.packbits(x.view(2, 5))
    for offsets in ([0, 5, 3], [0, 11], [-1, 5], []):
        message = re.escape(
            f"indptr must rise from 0 or more to 10, the size of x, or less; got {offsets}"
        )
        with pytest.raises(ValueError, match=message):
            fi_backend.segment_packbits(x, torch.tensor(offsets, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor; got list"):
        fi_backend.packbits([True])  # type: ignore[arg-type]
