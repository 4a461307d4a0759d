"""Public calls on one device, checked, in a process that may start no other program.

    python tests/prebuilt_program.py {cpu,cuda} {float32,bfloat16,float16} HEAD_DIM

It ends by printing how many kernel modules it loaded; prebuilt modules are the only place that they
can come from, since a compiler would be a program.
"""

from __future__ import annotations

import math
import sys
from typing import NoReturn

import torch

import fi_backend as fi
from fi_backend.jit import loader

_PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn")


def _forbid_programs(event: str, args: tuple[object, ...]) -> None:
    if event in _PROGRAMS:
        _fail(f"a program was started: {event} {args}")


def _fail(message: str) -> NoReturn:
    raise SystemExit(message)


def _check(what: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 0.0) -> None:
    error = float((actual.float() - expected).abs().max())
    tolerance = tolerance or (1e-4 if actual.dtype == torch.float32 else 3e-2)
    if not error <= tolerance:
        _fail(f"{what}: error {error}, tolerance {tolerance}")


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last rows of one request, in float32."""
    group = q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(group, 1) for x in (k, v))
    logits = torch.einsum("qhd,khd->hqk", q.float(), keys) / math.sqrt(q.shape[2])
    hidden = torch.ones(len(q), len(k), device=q.device).triu(len(k) - len(q) + 1).bool()
    return torch.einsum("hqk,khd->qhd", logits.masked_fill(hidden, -math.inf).softmax(2), values)


def _run_attention(dtype: torch.dtype, head_dim: int) -> None:
    q = torch.randn(20, 4, head_dim, dtype=dtype)
    cache = torch.randn(3, 2, 16, 2, head_dim, dtype=dtype)
    k, v = (cache[:, i].flatten(0, 1)[:40] for i in (0, 1))
    expected = _attention(q, k, v)

    workspace = torch.empty(1 << 20, dtype=torch.uint8)
    table = [torch.tensor(x, dtype=torch.int32) for x in ([0, 3], [0, 1, 2], [8])]
    decode = fi.BatchDecodeWithPagedKVCacheWrapper(workspace)
    decode.plan(*table, 4, 2, head_dim, 16, q_data_type=dtype)
    _check("decode", decode.run(q[-1:], cache), expected[-1:])

    rows = torch.tensor([0, 20], dtype=torch.int32)
    prefill = fi.BatchPrefillWithPagedKVCacheWrapper(workspace)
    prefill.plan(rows, *table, 4, 2, head_dim, 16, causal=True, q_data_type=dtype)
    out, lse = prefill.run(q, cache, return_lse=True)
    _check("prefill", out, expected)
    mask = torch.ones(20, 40, dtype=torch.bool).tril(20).flatten()
    prefill.plan(rows, *table, 4, 2, head_dim, 16, custom_mask=mask, q_data_type=dtype)
    _check("prefill with a custom mask", prefill.run(q, cache), expected)
    _check("merge", fi.merge_state(out, lse, out, lse)[0], expected)


def _run_other_calls(dtype: torch.dtype, head_dim: int) -> None:
    x, weight = torch.randn(5, head_dim, dtype=dtype), torch.ones(head_dim, dtype=dtype)
    expected = torch.nn.functional.rms_norm(x.float(), (head_dim,), eps=1e-6)
    _check("rmsnorm", fi.rmsnorm(x, weight), expected)
    quantised = torch.empty(x.shape, dtype=torch.int8)
    step = 0.125
    fi.rmsnorm_quant(quantised, x, weight, step)
    _check("rmsnorm_quant", quantised * step, expected, tolerance=step / 2 + 1e-5)
    gate, factor = x.float().chunk(2, -1)
    _check("silu_and_mul", fi.silu_and_mul(x), torch.nn.functional.silu(gate) * factor)
    q, k = (torch.randn(5, heads, head_dim, dtype=dtype) for heads in (4, 2))
    start = torch.zeros(5, dtype=torch.int32)
    _check("apply_rope_pos_ids", fi.apply_rope_pos_ids(q, k, start)[0], q.float())
    cache = torch.zeros(1, 2, 16, 2, head_dim, dtype=dtype)
    angles = torch.cat([torch.ones(1, head_dim // 2), torch.zeros(1, head_dim // 2)], 1)
    slots = torch.arange(5)
    fi.rope_append_to_cache(q, k, k, start, angles, (cache[:, 0], cache[:, 1]), slots)
    _check("rope_append_to_cache", cache[0, 0, :5], k.float())


def main(device: str, dtype_name: str, head_dim: str) -> None:
    """Run the calls; exit with a message where one is wrong."""
    dtype = getattr(torch, dtype_name)
    torch.manual_seed(0)
    with torch.device(device):
        torch.zeros(1)
        sys.addaudithook(_forbid_programs)
        _run_attention(dtype, int(head_dim))
        _run_other_calls(dtype, int(head_dim))
        fi.compile_kernels([], device, step_tables=True)
    print(f"{len(loader._modules)} modules, no program started")


if __name__ == "__main__":
    main(*sys.argv[1:])
