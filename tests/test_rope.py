"""fi_backend.rope: values of every form, in place and not, layouts, partial dims and errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fi_backend
from fi_backend import jit
from fi_backend.kernels.rope import rope_cuda_spec
from tests.guarded import FLOATS, guard_is_intact, guarded
from tests.tolerance import assert_accurate

HQ, HK = 5, 2  # no power of two, and no multiple of one another
# (head_dim, rotary_dim): whole heads, part of a head, pairs that fill no vector, and, behind
# rotary_dim, an odd number of values and one vector.
DIMS = [(64, 64), (128, 64), (80, 40), (10, 6), (96, 96), (9, 6), (72, 64), (576, 512)]

dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)
dims = pytest.mark.parametrize(("head_dim", "rotary_dim"), DIMS)
layouts = pytest.mark.parametrize("interleave", [False, True])
on_cpu = pytest.mark.parametrize("device", ["cpu"], indirect=True)
on_cuda = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)
pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture(scope="module", autouse=True)
def _cuda_kernels() -> None:
    """Compile what the CUDA cases load, in parallel."""
    if torch.cuda.is_available():
        jit.build(map(rope_cuda_spec, FLOATS))


def frequencies(rotary_dim: int, scale: float, theta: float) -> torch.Tensor:
    return theta ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim) / scale


def llama31_frequencies(
    rotary_dim: int, scale: float, theta: float, low: float, high: float, context: int
) -> torch.Tensor:
    """Piecewise by wavelength, as the model's authors wrote it."""
    result = []
    for frequency in frequencies(rotary_dim, 1.0, theta).tolist():
        wavelength = 2 * math.pi / frequency
        if wavelength < context / high:
            result.append(frequency)
        elif wavelength > context / low:
            result.append(frequency / scale)
        else:
            smooth = (context / wavelength - low) / (high - low)
            result.append((1 - smooth) * frequency / scale + smooth * frequency)
    return torch.tensor(result, dtype=torch.float64)


def rotate(
    x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, interleave: bool
) -> torch.Tensor:
    """Rotate x [tokens, heads, dim] by cosine, sine [tokens, pairs], in the dtype of x."""
    pairs = cosine.shape[-1]
    cosine, sine = cosine.to(x.dtype)[:, None], sine.to(x.dtype)[:, None]
    first, second = (
        (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2))
        if interleave
        else (slice(0, pairs), slice(pairs, 2 * pairs))
    )
    out = x.clone()
    out[..., first] = x[..., first] * cosine - x[..., second] * sine
    out[..., second] = x[..., second] * cosine + x[..., first] * sine
    return out


def check(
    out: torch.Tensor,
    x: torch.Tensor,
    positions: torch.Tensor,
    frequency: torch.Tensor,
    interleave: bool,
) -> None:
    exact = positions.double()[:, None] * frequency
    rounded = positions.float()[:, None] * frequency.float()
    reference = rotate(x.double(), exact.cos(), exact.sin(), interleave)
    in_dtype = rotate(x, rounded.cos(), rounded.sin(), interleave)
    assert_accurate(out, reference, in_dtype)
    assert torch.equal(out[..., 2 * len(frequency) :], x[..., 2 * len(frequency) :])


def make_qk(tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.randn(tokens, HQ, head_dim).to(dtype)
    return guarded(q), guarded(torch.randn(tokens, HK, head_dim).to(dtype))


@dtypes
@dims
@layouts
def test_pos_ids(dtype: torch.dtype, head_dim: int, rotary_dim: int, interleave: bool) -> None:
    q, k = make_qk(9, head_dim, dtype)
    pos_ids = torch.tensor([0, 5, 1, 4000, 77, 0, 2, 3, 1023], dtype=torch.int32)
    form = {"rotary_dim": rotary_dim, "interleave": interleave, "rope_scale": 2.0}
    q_rope, k_rope = fi_backend.apply_rope_pos_ids(q, k, pos_ids, **form)
    frequency = frequencies(rotary_dim, 2.0, 1e4)
    check(q_rope, q, pos_ids, frequency, interleave)
    check(k_rope, k, pos_ids, frequency, interleave)
    assert fi_backend.apply_rope_pos_ids_inplace(q, k, pos_ids.long(), **form) is None
    assert torch.equal(q, q_rope)
    assert torch.equal(k, k_rope)
    assert guard_is_intact(q)
    assert guard_is_intact(k)


@dtypes
@layouts
def test_ragged(dtype: torch.dtype, interleave: bool) -> None:
    """Empty requests own no token; tokens round the requests are left as they are."""
    q, k = make_qk(12, 32, dtype)
    indptr = torch.tensor([1, 1, 4, 4, 9, 10], dtype=torch.int32)
    offsets = torch.tensor([7, 100, 9, 0, 31], dtype=torch.int32)
    positions = torch.tensor([100, 101, 102, 0, 1, 2, 3, 4, 31])
    q_rope, k_rope = fi_backend.apply_rope(q, k, indptr, offsets, None, interleave, 1.0, 500.0)
    frequency = frequencies(32, 1.0, 500.0)
    check(q_rope[1:10], q[1:10], positions, frequency, interleave)
    check(k_rope[1:10], k[1:10], positions, frequency, interleave)
    outside = q[[0, 10, 11]]
    fi_backend.apply_rope_inplace(
        q, k, indptr.long(), offsets.long(), interleave=interleave, rope_theta=500.0
    )
    assert torch.equal(q[1:10], q_rope[1:10])
    assert torch.equal(k[1:10], k_rope[1:10])
    assert torch.equal(q[[0, 10, 11]], outside)


@layouts
@pytest.mark.parametrize("parameters", [(8, 5e5, 1, 4, 8192), (32, 1e4, 1.5, 3, 100)])
def test_llama31(interleave: bool, parameters: tuple[float, float, float, float, int]) -> None:
    scale, theta, low, high, context = parameters
    form = {
        "rotary_dim": 64,
        "interleave": interleave,
        "rope_scale": scale,
        "rope_theta": theta,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "old_context_len": context,
    }
    q, k = make_qk(6, 128, torch.float32)
    indptr, offsets = torch.tensor([0, 4, 6]), torch.tensor([8000, 10])
    positions = torch.tensor([8000, 8001, 8002, 8003, 10, 11])
    frequency = llama31_frequencies(64, *parameters)
    q_rope, k_rope = fi_backend.apply_llama31_rope(q, k, indptr, offsets, **form)
    check(q_rope, q, positions, frequency, interleave)
    check(k_rope, k, positions, frequency, interleave)
    by_position = fi_backend.apply_llama31_rope_pos_ids(q, k, positions, **form)
    assert torch.equal(by_position[0], q_rope)
    assert torch.equal(by_position[1], k_rope)
    q_copy, k_copy = q.clone(), k.clone()
    fi_backend.apply_llama31_rope_inplace(q, k, indptr, offsets, **form)
    fi_backend.apply_llama31_rope_pos_ids_inplace(q_copy, k_copy, positions, **form)
    for rotated in (q, q_copy):
        assert torch.equal(rotated, q_rope)
    for rotated in (k, k_copy):
        assert torch.equal(rotated, k_rope)


def test_llama31_defaults_are_those_of_the_model() -> None:
    q, k = make_qk(2, 128, torch.float32)
    positions = torch.tensor([9000, 1])
    q_rope, _ = fi_backend.apply_llama31_rope_pos_ids(q, k, positions)
    check(q_rope, q, positions, llama31_frequencies(128, 8, 5e5, 1, 4, 8192), False)


def test_defaults_are_plain_rope() -> None:
    q, k = make_qk(2, 64, torch.float32)
    q_rope, _ = fi_backend.apply_rope(q, k, torch.tensor([0, 2]), torch.tensor([50]))
    check(q_rope, q, torch.tensor([50, 51]), frequencies(64, 1.0, 1e4), False)


def test_angles_stay_exact_at_large_positions() -> None:
    """A float32 angle errs by 0.06 radians here; ours must not."""
    q, k = torch.randn(3, HQ, 128), torch.randn(3, HK, 128)
    positions = torch.tensor([2**20 + 1, 2**31 - 1, 123_456_789])
    q_rope, _ = fi_backend.apply_rope_pos_ids(q, k, positions)
    angle = positions.double()[:, None] * frequencies(128, 1.0, 1e4)
    reference = rotate(q.double(), angle.cos(), angle.sin(), False)
    assert (q_rope - reference).abs().max() <= 1e-6 * q.abs().max()


@dtypes
@layouts
@pytest.mark.parametrize("flat", [True, False])
def test_cos_sin_cache(dtype: torch.dtype, interleave: bool, flat: bool) -> None:
    """q and k are slices of one projection; unread rows of the cache are NaN."""
    head_dim, rotary_dim, tokens = 48, 36, 7
    qkv = torch.randn(tokens, (HQ + 2 * HK) * head_dim).to(dtype)
    query = qkv[:, : HQ * head_dim]
    key = qkv[:, HQ * head_dim : (HQ + HK) * head_dim]
    if not flat:
        query, key = query.unflatten(1, (HQ, head_dim)), key.unflatten(1, (HK, head_dim))
    positions = torch.tensor([3, 0, 3, 11, 5, 6, 11])
    angle = torch.arange(12)[:, None] * frequencies(rotary_dim, 1.0, 1e4)
    cache = torch.cat([angle.cos(), angle.sin()], -1).float()
    cache[[1, 2, 4, 7, 8, 9, 10]] = float("nan")
    run = fi_backend.apply_rope_with_cos_sin_cache
    outs = run(positions, query, key, head_dim, cache, is_neox=not interleave)
    cosine, sine = cache[positions].double().chunk(2, -1)
    for x, out in zip((query, key), outs, strict=True):
        assert out.shape == x.shape
        heads = x.reshape(tokens, -1, head_dim)
        reference = rotate(heads.double(), cosine, sine, interleave)
        in_dtype = rotate(heads, cosine, sine, interleave)
        assert_accurate(out.reshape(heads.shape), reference, in_dtype)
    value = qkv[:, (HQ + HK) * head_dim :].clone()
    fi_backend.apply_rope_with_cos_sin_cache_inplace(
        positions.int(), query, key, head_dim, cache, not interleave
    )
    assert torch.equal(query, outs[0])
    assert torch.equal(key, outs[1])
    assert torch.equal(qkv[:, (HQ + HK) * head_dim :], value)


def test_many_tokens_on_several_threads() -> None:
    q, k = torch.randn(600, 8, 64), torch.randn(600, 2, 64)
    indptr = torch.tensor([0, 1, 250, 250, 600])
    offsets = torch.tensor([5, 10, 0, 1000])
    positions = torch.cat([torch.tensor([5]), torch.arange(10, 259), torch.arange(1000, 1350)])
    q_rope, k_rope = fi_backend.apply_rope(q, k, indptr, offsets)
    check(q_rope, q, positions, frequencies(64, 1.0, 1e4), False)
    check(k_rope, k, positions, frequencies(64, 1.0, 1e4), False)


@dtypes
@layouts
def test_bits_do_not_depend_on_the_number_of_tokens(dtype: torch.dtype, interleave: bool) -> None:
    """On CUDA few tokens take other kernels than many, whose threads hold up to 8 heads each."""
    tokens, head_dim, rotary_dim = 1700, 128, 96
    q, k = torch.randn(tokens, 17, head_dim).to(dtype), torch.randn(tokens, 9, head_dim).to(dtype)
    positions = torch.randint(0, 4096, (tokens,))
    angle = torch.randn(4096, rotary_dim // 2)
    cache = torch.cat([angle.cos(), angle.sin()], -1)
    form = {"rotary_dim": rotary_dim, "interleave": interleave}

    def rotated(part: slice) -> tuple[torch.Tensor, ...]:
        rows = q[part], k[part]
        cached = fi_backend.apply_rope_with_cos_sin_cache(
            positions[part], *rows, head_dim, cache, not interleave
        )
        return *cached, *fi_backend.apply_rope_pos_ids(*rows, positions[part], **form)

    all_at_once = rotated(slice(None))
    in_parts = zip(*(rotated(slice(at, at + 340)) for at in range(0, tokens, 340)), strict=True)
    for out, parts in zip(all_at_once, in_parts, strict=True):
        assert torch.equal(out, torch.cat(parts))
    fi_backend.apply_rope_pos_ids_inplace(q, k, positions, **form)
    assert torch.equal(q, all_at_once[2])
    assert torch.equal(k, all_at_once[3])


def test_no_tokens() -> None:
    q, k = torch.zeros(0, HQ, 64), torch.zeros(0, HK, 64)
    none = torch.zeros(0, dtype=torch.int32)
    assert fi_backend.apply_rope_pos_ids(q, k, none)[0].shape == q.shape
    assert fi_backend.apply_rope(q, k, torch.zeros(1, dtype=torch.int32), none)[1].shape == k.shape


@pytest.mark.parametrize(
    ("error", "message", "change", "options"),
    [
        (TypeError, r"pos_ids must be a torch.Tensor; got list", lambda q, k, p: (q, k, [0]), {}),
        (TypeError, "pos_ids: dtype must be int32 or int64, got float32", lambda q, k, p: (
            q, k, p.float(),
        ), {}),
        (TypeError, "k: dtype must be float32, got bfloat16", lambda q, k, p: (
            q, k.bfloat16(), p,
        ), {}),
        (TypeError, "float32, torch.float16, torch.bfloat16; got torch.float64", lambda q, k, p: (
            q.double(), k, p,
        ), {}),
        (ValueError, r"pos_ids: shape must be \[4\], got \[3\]", lambda q, k, p: (q, k, p[:3]), {}),
        (ValueError, "k: must have as many tokens as q, 4, got 3", lambda q, k, p: (
            q, k[:3], p,
        ), {}),
        (ValueError, r"k: shape must be \[\*, \*, 16\]", lambda q, k, p: (q, k[..., :8], p), {}),
        (ValueError, "q and k: rank must be 3", lambda q, k, p: (q[0], k[0], p), {}),
        (ValueError, r"rotary_dim: .* in \[2, 16\], got 18", None, {"rotary_dim": 18}),
        (ValueError, r"rotary_dim: must be even .* got 7", None, {"rotary_dim": 7}),
        (ValueError, "rope_theta: must be above 0", None, {"rope_theta": 0.0}),
    ],
)  # fmt: skip
def test_bad_arguments(
    error: type[Exception],
    message: str,
    change: Callable[..., tuple[Any, ...]] | None,
    options: dict[str, Any],
) -> None:
    arguments: tuple[Any, ...] = (*ones(), torch.zeros(4).int())
    if change is not None:
        arguments = change(*arguments)
    with pytest.raises(error, match=message):
        fi_backend.apply_rope_pos_ids(*arguments, **options)


def ones() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(4, HQ, 16), torch.ones(4, HK, 16)


def test_bad_scalars_and_caches_change_nothing() -> None:
    q, k = ones()
    positions, cache = torch.zeros(4).int(), torch.zeros(8, 16)
    with pytest.raises(ValueError, match="high_freq_factor must be above low_freq_factor"):
        fi_backend.apply_llama31_rope_pos_ids_inplace(q, k, positions, low_freq_factor=4)
    run = fi_backend.apply_rope_with_cos_sin_cache_inplace
    with pytest.raises(ValueError, match=r"cos_sin_cache must be float32; got torch.bfloat16"):
        run(positions, q, k, 16, cache.bfloat16())
    with pytest.raises(ValueError, match="must be a multiple of head_size 24, got 80"):
        run(positions, q.flatten(1), k.flatten(1), 24, cache)
    assert torch.equal(q, torch.ones_like(q))
    assert torch.equal(k, torch.ones_like(k))


@on_cpu
def test_bad_indices_are_refused() -> None:
    q, k = ones()
    for indptr in ([0, 3, 2], [0, 5], [-1, 4]):
        with pytest.raises(ValueError, match="indptr: must rise from 0 or more to at most 4"):
            fi_backend.apply_rope_inplace(
                q, k, torch.tensor(indptr), torch.ones(len(indptr) - 1).int()
            )
    for bad in (8, -1):
        positions = torch.tensor([0, 1, bad, 2])
        with pytest.raises(ValueError, match=rf"in \[0, 8\).* positions\[2\] = {bad}"):
            fi_backend.apply_rope_with_cos_sin_cache_inplace(
                positions, q, k, 16, torch.zeros(8, 16)
            )
    assert torch.equal(q, torch.ones_like(q))
    assert torch.equal(k, torch.ones_like(k))


@on_cuda
def test_positions_outside_the_cache_are_skipped() -> None:
    q, k = ones()
    cache = torch.zeros(10, 16)[1:9]  # rows round it are ours to read, but must not count
    positions = torch.tensor([0, 8, -1, 2**40])
    fi_backend.apply_rope_with_cos_sin_cache_inplace(positions, q, k, 16, cache)
    assert torch.equal(q[0], torch.zeros_like(q[0]))
    assert torch.equal(k[0], torch.zeros_like(k[0]))
    assert torch.equal(q[1:], torch.ones_like(q[1:]))
    assert torch.equal(k[1:], torch.ones_like(k[1:]))


@on_cuda
@layouts
@pytest.mark.parametrize("head_dim", [128, 36])
def test_a_graph_replays_with_new_positions(interleave: bool, head_dim: int) -> None:
    """Many heads and tokens, captured; dependent launches see each other's writes."""
    q, k = torch.randn(300, 71, head_dim).half(), torch.randn(300, 3, head_dim).half()
    positions = torch.arange(300)
    angle = torch.randn(4096, head_dim // 2)
    cache = torch.cat([angle.cos(), angle.sin()], -1)
    copies = q.clone(), k.clone()

    def steps() -> None:
        for _ in range(3):
            fi_backend.apply_rope_with_cos_sin_cache_inplace(
                positions, *copies, head_dim, cache, not interleave
            )

    steps()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps()
    copies[0].copy_(q)
    copies[1].copy_(k)
    positions.copy_(torch.randint(0, 4096, (300,)))
    graph.replay()
    cosine, sine = cache[positions].chunk(2, -1)
    for x, out in zip((q, k), copies, strict=True):
        expected = x
        for _ in range(3):
            expected = rotate(expected.double(), cosine, sine, interleave).half()
        assert (out - expected).abs().max() <= 3 * torch.finfo(torch.float16).eps * x.abs().max()


@on_cuda
def test_offsets_past_two_to_the_31() -> None:
    """Tokens 2^30 elements apart, read through strides."""
    buffer = torch.empty(2**31 + 256, dtype=torch.bfloat16)
    q = buffer.as_strided((3, 1, 64), (2**30, 64, 1))
    k = buffer.as_strided((3, 1, 64), (2**30, 64, 1), 128)
    near = torch.randn(3, 1, 64).bfloat16(), torch.randn(3, 1, 64).bfloat16()
    q.copy_(near[0])
    k.copy_(near[1])
    positions = torch.tensor([3, 0, 77])
    fi_backend.apply_rope_pos_ids_inplace(q, k, positions)
    expected = fi_backend.apply_rope_pos_ids(*near, positions)
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])
