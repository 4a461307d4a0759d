"""The torch ops: correct schemas, traced whole by torch.compile, fake and meta tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fi_backend
from fi_backend import torch_ops

HEADS, DIM = 3, 16


def norms(x: torch.Tensor) -> list[torch.Tensor]:
    x = x.flatten(1)
    weight = torch.linspace(0, 1, x.shape[1])
    fused, residual = x + 1, x * 2
    fi_backend.fused_add_rmsnorm(fused, residual, weight)
    out = fi_backend.rmsnorm(x, weight, out=torch.empty_like(x))
    gemma = fi_backend.gemma_rmsnorm(x, weight)
    fi_backend.gemma_fused_add_rmsnorm(gemma, out, weight)
    quantised = torch.empty(3, *x.shape, dtype=torch.int8)
    fi_backend.rmsnorm_quant(quantised[0], x, weight, 0.1)
    fi_backend.fused_add_rmsnorm_quant(quantised[1], x, residual, weight, torch.tensor([0.1]))
    fi_backend.layernorm_quant(quantised[2], x, weight, weight, torch.tensor(0.2))
    layer = fi_backend.layernorm(x, weight, weight)
    return [fused, residual, out, gemma, layer, quantised]


def activations(x: torch.Tensor) -> list[torch.Tensor]:
    return [
        fi_backend.silu_and_mul(x),
        fi_backend.gelu_and_mul(x[None, None]),
        fi_backend.gelu_tanh_and_mul(x, torch.empty(x.shape[0], HEADS, DIM // 2)),
    ]


def ropes(x: torch.Tensor) -> list[torch.Tensor]:
    q, k = x + 0, x[:, :2] * 2
    tokens = x.shape[0]
    positions = torch.arange(tokens)
    indptr, offsets = torch.tensor([0, tokens]), torch.tensor([4])
    outs = [*fi_backend.apply_rope(q, k, indptr, offsets)]
    outs += fi_backend.apply_llama31_rope_pos_ids(q, k, positions, interleave=True)
    fi_backend.apply_rope_pos_ids_inplace(q, k, positions)
    cache = torch.linspace(-1, 1, 64 * DIM).view(64, DIM)
    query, key = q.flatten(1), k.flatten(1)
    outs += fi_backend.apply_rope_with_cos_sin_cache(positions, query, key, DIM, cache)
    fi_backend.apply_rope_with_cos_sin_cache_inplace(positions, query, key, DIM, cache, False)
    return [*outs, q, k, query, key]


def pages(x: torch.Tensor) -> list[torch.Tensor]:
    tokens = x.shape[0]
    cache = torch.zeros(4, 2, 4, HEADS, DIM)
    slots = torch.arange(tokens) + 2
    fi_backend.append_to_cache(x, x * 2, (cache[:, 0], cache[:, 1]), slots)
    indptr, indices = torch.tensor([0, 2]), torch.tensor([3, 2])
    last = torch.tensor([tokens - 4])
    lens = fi_backend.get_seq_lens(indptr, last, 4)
    batch, positions = fi_backend.get_batch_indices_positions(
        torch.tensor([0, tokens]), lens, tokens
    )
    fi_backend.append_paged_kv_cache(x, x, batch, positions, cache, indices, indptr, last)
    return [cache, batch, positions, fi_backend.packbits(x.flatten() > 0)]


def rope_appends(x: torch.Tensor) -> list[torch.Tensor]:
    tokens = x.shape[0]
    key, value = x[:, :2] * 2, x[:, 1:] + 1
    positions, angles = torch.arange(tokens), torch.linspace(-1, 1, 64 * DIM).view(64, DIM)
    caches = torch.zeros(2, 4, 4, 2, DIM)
    first = fi_backend.rope_append_to_cache(
        x, key, value, positions, angles, (caches[0], caches[1]), positions + 3,
        q_weight=angles[0], k_scale=torch.tensor(2.0), is_neox=False,
    )  # fmt: skip
    indptr, indices = torch.tensor([0, 2]).int(), torch.tensor([3, 0]).int()
    paged = torch.zeros(4, 2, 4, 2, DIM)
    second = x * 2
    fi_backend.rope_append_paged_kv_cache(
        x, key, value, positions, angles, torch.zeros(tokens).int(), positions.int(), paged,
        indices, indptr, out=second,
    )  # fmt: skip
    return [first, second, caches, paged]


FAMILIES = [norms, activations, ropes, pages, rope_appends]


@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_whole(family: Callable[[torch.Tensor], list[torch.Tensor]]) -> None:
    """No graph break, and functionalisation keeps every in-place effect."""
    x = torch.randn(6, HEADS, DIM)
    expected = family(x.clone())
    torch.compiler.reset()
    compiled = torch.compile(family, fullgraph=True, backend="aot_eager")
    for out, want in zip(compiled(x), expected, strict=True):
        assert torch.equal(out, want)


@pytest.mark.parametrize("family", FAMILIES)
def test_fake_tensors(family: Callable[[torch.Tensor], list[torch.Tensor]]) -> None:
    expected = family(torch.randn(6, HEADS, DIM))
    with FakeTensorMode():
        outs = family(torch.empty(6, HEADS, DIM))
    assert [(out.shape, out.dtype) for out in outs] == [(t.shape, t.dtype) for t in expected]


def test_meta_tensors() -> None:
    x = torch.empty(4, 8, device="meta")
    assert fi_backend.rmsnorm(x, torch.empty(8, device="meta")).is_meta
    assert fi_backend.silu_and_mul(x).shape == (4, 4)


def test_schemas_tell_the_truth() -> None:
    ops = torch.ops.fi_backend
    x, weight = torch.randn(4, 32), torch.randn(32)
    q, k, positions = torch.randn(4, 3, 8), torch.randn(4, 1, 8), torch.arange(4)
    angles = (8, False, 1.0, 1e4, 0.0, 0.0)
    cache = torch.zeros(2, 2, 4, 3, 8)
    samples = [
        (ops.rmsnorm, (torch.empty_like(x), x, weight, 1e-6, 0.0)),
        (ops.fused_add_rmsnorm, (x.clone(), x.clone(), weight, 1e-6, 1.0)),
        (ops.layernorm, (torch.empty_like(x), x, weight, weight, 1e-6)),
        (
            ops.rmsnorm_quant,
            (x.to(torch.int8), x, x.clone(), weight, 1.0, torch.ones(1), 1e-6, False),
        ),
        (ops.rmsnorm_quant, (x.to(torch.int8), x, None, weight, 0.5, None, 1e-6)),
        (ops.layernorm_quant, (x.to(torch.int8), x, weight, weight, 0.5, None, 1e-6)),
        (ops.gelu_and_mul, (torch.empty(4, 16), x)),
        (ops.rope, (q, k, q.clone(), k.clone(), positions, None, None, *angles)),
        (ops.rope_inplace, (q.clone(), k.clone(), positions, None, None, *angles)),
        (
            ops.append_slots,
            (q, q, cache[:, 0], cache[:, 1], positions, 1.0, 1.0, None, None),
        ),
        (
            ops.rope_append_slots,
            (
                *(q, k, k * 2, q.clone(), positions, torch.rand(9, 8)),
                *(cache[:, 0, :, :1], cache[:, 1, :, :1], positions, False),
                *(torch.ones(8), None, 1e-6, 0.0, 1.0, 1.0, None, None, False),
            ),
        ),
    ]
    for op, arguments in samples:
        torch.library.opcheck(op.default, arguments)


def test_register_runs_what_it_is_given() -> None:
    op = torch_ops.register(
        "test_double(Tensor x) -> Tensor", lambda x: x * 2, lambda x: torch.empty_like(x)
    )
    x = torch.randn(3)
    assert torch.equal(op.traced(x), x * 2)
    assert op.traced(x.to("meta")).shape == (3,)
    assert torch_ops.runs_directly("test_double", x=x)
    assert not torch_ops.runs_directly("test_double", x=x.to("meta"))


def test_other_devices_are_refused() -> None:
    """Without such a device, a tensor that claims one stands for it."""

    class Elsewhere(torch.Tensor):
        device = torch.device("mps:0")

    x = torch.zeros(2, 8).as_subclass(Elsewhere)
    message = "packbits: MPS tensors are not supported; got x on device=mps:0, expected cpu or cuda"
    with pytest.raises(fi_backend.errors.UnsupportedError, match=message):
        fi_backend.packbits(x)


@pytest.mark.parametrize("isa", ["avx2", "generic"])
def test_other_instruction_sets(isa: str) -> None:
    """The bfloat16 cases again, compiled for lesser machines."""
    from fi_backend.jit import isa as levels

    if not levels.runs_here(isa) or isa == levels.resolve():
        pytest.skip(f"nothing to gain: this run uses {levels.resolve()}")
    here = Path(__file__).parent
    files = [str(here / f"test_{name}.py") for name in ("norm", "rope", "activation", "page")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, "-k", "bfloat16", *files],
        cwd=here.parent,
        env={**os.environ, "FI_BACKEND_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout
