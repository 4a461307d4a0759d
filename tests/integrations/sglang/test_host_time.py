"""What a graph's replay costs the host: the same for any lengths, and no operation of torch's."""

from __future__ import annotations

import json
import statistics
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_step import DIM, DTYPE, HEADS, Server, make_layer
from torch.utils._python_dispatch import TorchDispatchMode

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
REQUESTS = 256
MOST_US = 100.0


class Operations(TorchDispatchMode):
    """Notes which operations of torch's run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(op))
        return op(*args, **(kwargs or {}))


def captured_step(device: str, page: int) -> tuple[Any, SimpleNamespace]:
    """A backend that has captured a decode step of 256 requests, and what prepares its replay."""
    server = Server(device, page, slots=8192, context=2048)
    backend, layer = server.backend, make_layer()
    batch = SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        batch_size=REQUESTS,
        req_pool_indices=torch.zeros(REQUESTS, dtype=torch.int64, device=device),
        seq_lens=torch.ones(REQUESTS, dtype=torch.int64, device=device),
        seq_lens_cpu=None,
        out_cache_loc=None,
        spec_info=None,
    )
    backend.init_cuda_graph_state(REQUESTS, REQUESTS)
    backend.init_forward_metadata_out_graph(batch, in_capture=True)
    q = torch.zeros(REQUESTS, HEADS * DIM, dtype=DTYPE, device=device)
    backend.forward_decode(q, None, None, layer, batch)
    return backend, batch


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page", [1, 64])
def test_a_replay_runs_no_operation_of_torch(page: int, device: str) -> None:
    backend, batch = captured_step(device, page)
    with Operations() as operations:
        backend.init_forward_metadata_out_graph(batch)
    assert set(operations.names) == {"aten.slice.Tensor"}, operations.names  # views only


@pytest.mark.gpu  # on a CPU the host itself plans the step, as fast as that CPU is
@pytest.mark.parametrize("page", [1, 64])
def test_a_replay_is_prepared_in_a_tenth_of_a_millisecond(page: int) -> None:
    backend, batch = captured_step("cuda", page)
    times = []
    for _ in range(100):
        began = time.perf_counter()
        backend.init_forward_metadata_out_graph(batch)
        times.append(1e6 * (time.perf_counter() - began))
    row = {"cell": f"replay of {REQUESTS} requests, page {page}", "us": statistics.median(times)}
    print(json.dumps({**row, "best_us": min(times)}))
    assert min(times) < MOST_US  # the best, because others use the machine too
