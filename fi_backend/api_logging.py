"""The API call log: which public call was made with what, written before it runs.

``FI_BACKEND_LOGLEVEL`` (where it is unset, ``FLASHINFER_LOGLEVEL``) says how much:

    0  nothing: no call is wrapped, so none costs more
    1  names
    3  also arguments and results; of tensors dtype, shape, device and strides, never values
    5  also statistics of tensors' values, which waits for the GPU

``FI_BACKEND_LOGDEST`` (``FLASHINFER_LOGDEST``) says where to: stderr, stdout or a file. The
variables are read when the package is imported. A record is flushed before its call runs, so the
last one names the call that ended a process. Calls inside a logged call are not logged, nor are
those that torch.compile traces. While a CUDA graph is captured, level 5 leaves statistics out.
"""

from __future__ import annotations

import inspect
import itertools
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from fi_backend import env
from fi_backend._public_calls import (
    bound_arguments,
    call_name,
    unless_compiled,
    wrap_public_calls,
)

__all__ = ["ApiLog", "install"]

METADATA, STATISTICS = 3, 5  # the levels above that of names
_STREAMS = ("stderr", "stdout")

# Statistics convert to float64, and a server has no memory to spare: caches are left out.
_MAX_STATISTICS_ELEMENTS = 1 << 24
_MAX_ITEMS = 8


def install(module_of: Mapping[str, str]) -> None:
    """Log every public call as the environment says.

    Args:
        module_of: the module below fi_backend of every public name.

    Raises:
        EnvironmentVariableError: a variable does not parse.
        OSError: the file to write to cannot be opened.
    """
    wrap_public_calls(module_of, ApiLog(env.LOGLEVEL.get(), env.LOGDEST.get()).wrap)


class _Nesting(threading.local):
    inside = False


class ApiLog:
    """Writes records of calls.

    Args:
        level: 1, 3 or 5; see the module.
        destination: "stderr", "stdout" or a path, in which %i stands for the process id.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, level: int, destination: str) -> None:
        self._level = level
        self._destination = destination
        self._file: tuple[int, int] | None = None  # process id, descriptor
        self._nesting = _Nesting()
        self._numbers = itertools.count(1)
        if destination not in _STREAMS:
            self._descriptor()

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with a record of each call before it, and of its result after it."""
        signature = inspect.signature(function)

        def logged(*args: Any, **kwargs: Any) -> Any:
            if self._nesting.inside:
                return function(*args, **kwargs)
            name = f"{call_name(function, args)} #{next(self._numbers)}"
            self._write(name, bound_arguments(signature, args, kwargs))
            self._nesting.inside = True
            try:
                result = function(*args, **kwargs)
            except BaseException as error:
                self._write(f"{name} raised {type(error).__name__}: {error}", {})
                raise
            finally:
                self._nesting.inside = False
            if self._level >= METADATA and not function.__name__.startswith("__"):
                self._write(f"{name} returned", {"result": result})
            return result

        return unless_compiled(function, logged)

    def _write(self, heading: str, values: Mapping[str, Any]) -> None:
        now = time.time()
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        lines = [f"[{stamp}.{int(now * 1000) % 1000:03d} pid {os.getpid()}] fi_backend.{heading}"]
        if self._level >= METADATA:
            has_statistics = self._level >= STATISTICS
            lines += [f"  {name}: {_text(v, has_statistics)}" for name, v in values.items()]
        text = "\n".join(lines) + "\n"
        if self._destination in _STREAMS:
            print(text, end="", file=getattr(sys, self._destination), flush=True)
        else:  # one write, so that records of several threads and processes do not mix
            try:
                os.write(self._descriptor(), text.encode())
            except OSError as error:  # a full disk is no reason to stop a server
                warnings.warn(f"fi_backend: API calls are not logged: {error}", stacklevel=4)

    def _descriptor(self) -> int:
        pid = os.getpid()
        if self._file is None or self._file[0] != pid:  # a forked process has a file of its own
            path = os.path.expanduser(self._destination.replace("%i", str(pid)))
            self._file = pid, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        return self._file[1]


def _text(value: object, has_statistics: bool) -> str:
    """Describe a value without reading a tensor, unless for its statistics."""
    if isinstance(value, torch.Tensor):
        return _tensor_text(value) + (_statistics(value) if has_statistics else "")
    if isinstance(value, Mapping):
        items = [f"{key!r}: {_text(v, has_statistics)}" for key, v in value.items()]
        return f"{{{_joined(items)}}}"
    if isinstance(value, (list, tuple)):
        return f"[{_joined([_text(item, has_statistics) for item in value[: _MAX_ITEMS + 1]])}]"
    if is_dataclass(value) and not isinstance(value, type):
        shown = [f for f in fields(value) if f.repr]
        items = [f"{f.name}={_text(getattr(value, f.name), has_statistics)}" for f in shown]
        return f"{type(value).__name__}({', '.join(items)})"
    if isinstance(value, (int, float, str, torch.dtype, torch.device, type(None))):
        return repr(value)
    return f"<{type(value).__name__}>"


def _joined(items: list[str]) -> str:
    return ", ".join(items[:_MAX_ITEMS] + ["..."] * (len(items) > _MAX_ITEMS))


def _tensor_text(tensor: torch.Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    strides = "" if tensor.is_contiguous() else f" strides {list(tensor.stride())}"
    return f"{dtype} {list(tensor.shape)} {tensor.device}{strides}"


def _statistics(tensor: torch.Tensor) -> str:
    reason = _no_statistics(tensor)
    if reason is not None:
        return f" ({reason})"
    values = tensor.detach().to(torch.float64)
    finite = values[values.isfinite()]
    nan, infinite = int(values.isnan().sum()), int(values.isinf().sum())
    if finite.numel() == 0:
        return f" (nan={nan} inf={infinite})"
    low, high = (float(extreme) for extreme in finite.aminmax())
    return f" (min={low:g} max={high:g} mean={float(finite.mean()):g} nan={nan} inf={infinite})"


def _no_statistics(tensor: torch.Tensor) -> str | None:
    """Say why the values of a tensor cannot be looked at, None if they can."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_meta:
        return "no values"
    if tensor.numel() == 0:
        return "empty"
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return "no statistics while a CUDA graph is captured"
    if tensor.numel() > _MAX_STATISTICS_ELEMENTS:
        return "too large for statistics"
    return None
