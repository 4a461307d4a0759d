"""What calls say they support is what they then do."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fi_backend as fi
from fi_backend.errors import UnsupportedError

WITHOUT_KERNEL = {"get_seq_lens", "packbits", "segment_packbits"}
CALLS = [name for name in fi.__all__ if fi._MODULE_OF[name] in fi._QUERIED]
WRAPPERS = {
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
}


@pytest.mark.parametrize("name", CALLS)
def test_every_call_can_be_asked(name: str) -> None:
    call = getattr(fi, name)
    for cc in (75, 80, 90, 100, 120):
        answer = call.is_compute_capability_supported(cc)
        assert answer is fi.is_compute_capability_supported(name, cc)
        assert answer is (cc >= 80 or name in WITHOUT_KERNEL)
        assert call.is_backend_supported("auto", cc) is answer
    assert call.is_backend_supported("auto")
    assert not call.is_backend_supported("no such backend")


def test_an_object_of_a_wrapper_can_be_asked_too() -> None:
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(torch.empty(16, dtype=torch.uint8))
    assert wrapper.is_backend_supported("fa2", 90)
    assert not wrapper.is_backend_supported("fa2", 75)


@pytest.mark.parametrize("name", sorted(WRAPPERS))
@pytest.mark.parametrize("backend", ["auto", "fa2", "fa3", "cudnn", "trtllm-gen", "cute-dsl"])
def test_constructors_take_the_backends_that_are_supported(name: str, backend: str) -> None:
    make = partial(getattr(fi, name), torch.empty(16, dtype=torch.uint8), backend=backend)
    if fi.is_backend_supported(name, backend):
        make()
    else:
        with pytest.raises(UnsupportedError, match="backend must be one of"):
            make()


def test_calls_take_cuda_tensors() -> None:
    """A fake tensor is refused by device as a real one is, and reaches no kernel."""
    with FakeTensorMode():
        rows = torch.empty(2, 64, device="cuda", dtype=torch.float16)
        weight = torch.empty(64, device="cuda", dtype=torch.float16)
        assert fi.rmsnorm(rows, weight).device.type == "cuda"
        assert fi.packbits(torch.empty(9, device="cuda", dtype=torch.bool)).shape == (2,)


def test_unknown_calls_are_named() -> None:
    with pytest.raises(ValueError, match="got 'no_such_call'"):
        fi.is_backend_supported("no_such_call", "auto")
