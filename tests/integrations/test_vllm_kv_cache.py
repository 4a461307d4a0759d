"""The two forms of vLLM's cache tensor, and its dtype names."""

from __future__ import annotations

import pytest
import torch

from fi_backend.integrations.vllm.kv_cache import cache_dtype, split_cache

PAGES, HEADS, PAGE, DIM = 3, 2, 16, 8


@pytest.mark.parametrize("head_major", [False, True])
def test_keys_and_values_side_by_side(head_major: bool) -> None:
    """From 0.32 on a row holds the key and then the value, in either physical order."""
    shape = (PAGES, HEADS, PAGE, 2 * DIM) if head_major else (PAGES, PAGE, HEADS, 2 * DIM)
    cache = torch.randn(shape)
    cache = cache if head_major else cache.transpose(1, 2)
    k, v = split_cache(cache, DIM, torch.float32)
    assert k.shape == v.shape == (PAGES, PAGE, HEADS, DIM)
    assert torch.equal(k[2, 5, 1], cache[2, 1, 5, :DIM])
    assert torch.equal(v[2, 5, 1], cache[2, 1, 5, DIM:])
    assert k.data_ptr() == cache.data_ptr()


def test_value_heads_of_another_size() -> None:
    k, v = split_cache(torch.randn(PAGES, HEADS, PAGE, DIM + 4), DIM, torch.float32)
    assert (k.shape[-1], v.shape[-1]) == (DIM, 4)


def test_keys_and_values_in_a_dimension() -> None:
    """0.25 has [pages, 2, page, heads, dim]."""
    cache = torch.randn(PAGES, 2, PAGE, HEADS, DIM)
    k, v = split_cache(cache, DIM, torch.float32)
    assert torch.equal(k, cache[:, 0])
    assert torch.equal(v, cache[:, 1])


def test_bytes_are_read_as_fp8() -> None:
    cache = torch.zeros(PAGES, HEADS, PAGE, 2 * DIM, dtype=torch.uint8)
    k, v = split_cache(cache, DIM, torch.float8_e5m2)
    assert k.dtype == v.dtype == torch.float8_e5m2


def test_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kv_cache must be .* got shape \[3, 3, 16, 2, 8\]"):
        split_cache(torch.zeros(PAGES, 3, PAGE, HEADS, DIM), DIM, torch.float32)


def test_cache_dtype_names() -> None:
    assert cache_dtype("auto", torch.bfloat16) == torch.bfloat16
    assert cache_dtype("fp8", torch.bfloat16) == torch.float8_e4m3fn
    assert cache_dtype("fp8_e5m2", torch.bfloat16) == torch.float8_e5m2
    with pytest.raises(ValueError, match="got nvfp4"):
        cache_dtype("nvfp4", torch.bfloat16)
