"""A `flashinfer` that is this package: `flashinfer.x` becomes `fi_backend.x` once install() ran.

Without a GPU, "cuda" then means the CPU, and the machine claims to be a Hopper GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import fi_backend

__all__ = ["install"]

HAS_GPU = torch.cuda.is_available()
CAPABILITY = torch.cuda.get_device_capability() if HAS_GPU else (9, 0)
# FlashInfer's modules that are elsewhere here; None: ours of that name is another thing.
MODULES = {"attention": "batch_attention", "jit": None, "trace": None}
# What the tests ask about the machine; every other "is_..." and "has_..." is false.
ANSWERS = {
    "device_support_pdl": lambda device: CAPABILITY >= (9, 0),
    "get_compute_capability": lambda device: CAPABILITY,
    "has_flashinfer_jit_cache": lambda: True,  # nothing of FlashInfer's is to be compiled
    "is_sm90a_supported": lambda device: CAPABILITY == (9, 0),
}


class Absent(type):
    """A name that is not here: it can be imported, and skips the test that calls it."""

    def __getattr__(cls, name: str) -> Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{cls.__name__}.{name}", (), {})

    def __getitem__(cls, key: object) -> Absent:
        return cls

    def __call__(cls, *args: object, **kwargs: object) -> None:
        # Some tests call it while they are imported: then there is nothing of theirs to run.
        pytest.skip(f"absent: {cls.__name__}", allow_module_level=True)

    __truediv__ = __call__  # of a path


class RaggedWithSinks(fi_backend.BatchPrefillWithRaggedKVCacheWrapper):
    """Takes sinks by name in the place of FlashInfer's C++ for them, as its users have to."""

    def __init__(self, *args: Any, jit_args: Any = None, jit_kwargs: Any = None, **kwargs: Any):
        self._has_sinks = jit_args is not None and "AttentionSink" in jit_args
        super().__init__(*args, jit_args=None if self._has_sinks else jit_args, **kwargs)

    def run(self, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        if self._has_sinks:
            return super().run(q, k, v, sinks=args[0], **kwargs)
        return super().run(q, k, v, *args, **kwargs)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `flashinfer` and everything below it."""

    def find_spec(self, name: str, path: object, target: object = None) -> Any:
        if name.split(".")[0] != "flashinfer":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: types.ModuleType) -> None:
        name = module.__name__.partition(".")[2]
        ours, target = None, MODULES.get(name, name)
        if target is not None:
            with contextlib.suppress(ImportError):
                ours = importlib.import_module(f"fi_backend.{target}".rstrip("."))

        def get(attribute: str) -> Any:
            if attribute.startswith("__"):
                raise AttributeError(attribute)
            if attribute == "BatchPrefillWithRaggedKVCacheWrapper":
                return RaggedWithSinks
            value = getattr(ours, attribute, None) or ANSWERS.get(attribute)
            if isinstance(value, types.ModuleType):
                return importlib.import_module(f"flashinfer.{attribute}")
            if value is None and attribute.startswith(("is_", "has_")):
                return lambda *args: False
            return value or Absent(f"{name}.{attribute}".lstrip("."), (), {})

        module.__getattr__ = get  # type: ignore[method-assign]


class CudaMeansCpu(TorchFunctionMode):
    """Makes tensors on the CPU where a test asks for a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to:
            args = ["cpu" if type(arg) is int else arg for arg in args]
        kwargs = {key: _on_cpu(value) for key, value in (kwargs or {}).items()}
        return func(*map(_on_cpu, args), **kwargs)


class CpuGenerator(torch.Generator):
    """Draws on the CPU for a test that asks for a GPU's random numbers."""

    def __new__(cls, device: object = None) -> CpuGenerator:
        return super().__new__(cls)


class NeedsGpu:
    """Stands for what no CPU has."""

    def __new__(cls, *args: object, **kwargs: object) -> NeedsGpu:
        pytest.skip("needs a GPU's streams and graphs")


def _on_cpu(value: Any) -> Any:
    is_device = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
    return "cpu" if is_device else value


def install() -> None:
    """Let `import flashinfer` find this package, for the rest of the process."""
    sys.meta_path.insert(0, Finder())
    if HAS_GPU:
        return
    CudaMeansCpu().__enter__()
    torch.Generator = CpuGenerator  # type: ignore[misc]
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.current_device = lambda: 0
    cuda.get_device_capability = lambda device=None: CAPABILITY
    cuda.mem_get_info = lambda device=None: (0, 0)  # tests of huge tensors leave themselves out
    cuda.synchronize = lambda device=None: None
    cuda.Stream = cuda.CUDAGraph = NeedsGpu
