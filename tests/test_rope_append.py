"""The fused norm, rope and append: values of every form, layouts, dtypes, skipped rows, errors."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

import fi_backend
from fi_backend import jit
from fi_backend.kernels.rope_append import rope_append_cuda_spec

HQ, HK = 5, 2
PAGES, PAGE_SIZE = 7, 4
FP8 = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
DTYPES = [
    *((dtype, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    *product((torch.bfloat16,), FP8),
    (torch.float16, torch.float8_e4m3fn),
    (torch.float32, torch.bfloat16),
]
# (head_dim, rotary_dim, head_dim_vo): whole heads, part of a head, one that fills no lanes, sizes
# that 16 bytes do not divide, and the largest.
DIMS = [(128, 128, 128), (64, 32, 64), (96, 96, 64), (10, 6, 9), (72, 64, 40), (512, 64, 512)]
NONE: dict[str, Any] = {}

dtypes = pytest.mark.parametrize(("dtype", "cache_dtype"), DTYPES, ids=str)
dims = pytest.mark.parametrize("dims", DIMS, ids=str)
layouts = pytest.mark.parametrize("is_neox", [True, False])
on_cpu = pytest.mark.parametrize("device", ["cpu"], indirect=True)
on_cuda = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)
pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture(scope="module", autouse=True)
def _cuda_kernels() -> None:
    """Compile what the CUDA cases load, in parallel."""
    if torch.cuda.is_available():
        jit.build([rope_append_cuda_spec(*pair) for pair in DTYPES])


def make_qkv(tokens: int, dtype: torch.dtype, dims: tuple[int, int, int]) -> list[torch.Tensor]:
    """q, k and v as slices of one projection, with a margin behind."""
    sizes = [HQ * dims[0], HK * dims[0], HK * dims[2], 8]
    parts = torch.randn(tokens, sum(sizes)).to(dtype).split(sizes, 1)[:3]
    return [part.unflatten(1, (heads, -1)) for part, heads in zip(parts, (HQ, HK, HK), strict=True)]


def make_angles(rotary_dim: int, rows: int = 50) -> torch.Tensor:
    angle = torch.randn(rows, rotary_dim // 2)
    return torch.cat([angle.cos(), angle.sin()], -1)


def make_caches(
    dtype: torch.dtype, dims: tuple[int, int, int], hnd: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Caches [PAGES, PAGE_SIZE, HK, dim] full of 7, heads before or behind tokens."""
    caches = []
    for dim in (dims[0], dims[2]):
        shape = (PAGES, HK, PAGE_SIZE, dim) if hnd else (PAGES, PAGE_SIZE, HK, dim)
        cache = torch.full(shape, 7.0).to(dtype)
        caches.append(cache.transpose(1, 2) if hnd else cache)
    return caches[0], caches[1]


def normalised(x: torch.Tensor, weight: torch.Tensor, eps: float, bias: float) -> torch.Tensor:
    scale = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps)
    return x.double() * scale * (weight.double() + bias)


def rotated(x: torch.Tensor, angles: torch.Tensor, is_neox: bool) -> torch.Tensor:
    """Rotate x [tokens, heads, dim] by rows of angles [tokens, rotary_dim], in float64."""
    cosine, sine = angles.double()[:, None].chunk(2, -1)
    pairs, out = cosine.shape[-1], x.double().clone()
    first = slice(0, pairs) if is_neox else slice(0, 2 * pairs, 2)
    second = slice(pairs, 2 * pairs) if is_neox else slice(1, 2 * pairs, 2)
    a, b = out[..., first].clone(), out[..., second].clone()
    out[..., first] = a * cosine - b * sine
    out[..., second] = b * cosine + a * sine
    return out


def assert_rounded_once(out: torch.Tensor, exact: torch.Tensor) -> None:
    """`out` is `exact`, computed in float32, rounded to the nearest value of its dtype."""
    info = torch.finfo(out.dtype)
    exact = exact.clamp(-info.max, info.max)
    bound = exact.abs().clamp(min=info.smallest_normal) * info.eps / 2
    # A rotation cancels: its float32 error is that of the larger value of the pair.
    bound = bound + 1e-6 * exact.abs().amax(-1, keepdim=True)
    assert ((out.double() - exact).abs() <= bound).all()


@dtypes
@dims
@layouts
@pytest.mark.parametrize("norm", [False, True])
def test_slots(
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    dims: tuple[int, int, int],
    is_neox: bool,
    norm: bool,
) -> None:
    tokens = 6
    q, k, v = make_qkv(tokens, dtype, dims)
    positions = torch.tensor([3, 0, 49, 3, 7, 11])
    angles = make_angles(dims[1])
    slots = torch.tensor([5, -1, 0, PAGES * PAGE_SIZE - 1, 13])  # one less than tokens
    options: dict[str, Any] = {"is_neox": is_neox, "k_scale": 0.5, "v_scale": torch.tensor(0.25)}
    q_exact, k_exact = q.double(), k.double()
    if norm:
        q_weight, k_weight = torch.randn(2, dims[0]).to(dtype)
        options |= {"q_weight": q_weight, "k_weight": k_weight, "eps": 1e-5, "weight_bias": 1.0}
        q_exact = normalised(q, q_weight, 1e-5, 1.0)
        k_exact = normalised(k, k_weight, 1e-5, 1.0)
    q_exact = rotated(q_exact, angles[positions], is_neox)
    k_exact = rotated(k_exact, angles[positions], is_neox)

    caches = make_caches(cache_dtype, dims, hnd=norm)
    before = [x.clone() for x in (q, k, v)]
    out = fi_backend.rope_append_to_cache(q, k, v, positions, angles, caches, slots, **options)
    assert_rounded_once(out, q_exact)
    untouched = torch.ones(PAGES * PAGE_SIZE, dtype=torch.bool)
    scales = (0.5, 0.25) if cache_dtype in FP8 else (1.0, 1.0)
    for cache, rows, scale in zip(caches, (k_exact, v.double()), scales, strict=True):
        stored = cache.flatten(0, 1) if not norm else cache.reshape(-1, *cache.shape[2:])
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                assert_rounded_once(stored[slot], rows[token] / scale)
                untouched[slot] = False
        assert (stored[untouched].float() == 7.0).all()
    for x, old in zip((q, k, v), before, strict=True):
        assert torch.equal(x, old)

    in_place = fi_backend.rope_append_to_cache(
        q,
        k,
        v,
        positions.int(),
        angles,
        make_caches(cache_dtype, dims),
        slots.int(),
        out=q,
        **options,
    )
    assert in_place is q
    assert torch.equal(q, out)
    assert torch.equal(k, before[1])
    assert torch.equal(v, before[2])


@dtypes
@dims
@layouts
def test_angles_may_have_the_dtype_of_the_rows(
    dtype: torch.dtype, cache_dtype: torch.dtype, dims: tuple[int, int, int], is_neox: bool
) -> None:
    """They are what their values are in float32, of tokens in a cache with other strides too."""
    q, k, v = make_qkv(4, dtype, dims)
    positions, slots = torch.tensor([7, 0, 49, 7]), torch.tensor([2, 9, -1, 20])
    angles = make_angles(dims[1] + 32).to(dtype)[:, : dims[1]]

    def run(angles: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
        caches = make_caches(cache_dtype, dims)
        out = fi_backend.rope_append_to_cache(
            q, k, v, positions, angles, caches, slots, is_neox=is_neox
        )
        return [out, *(cache.float() for cache in caches)]

    rounded, in_float = run(angles, positions.int()), run(angles.float(), positions)
    assert all(torch.equal(*pair) for pair in zip(rounded, in_float, strict=True))


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("angle_dtype", [torch.float32, torch.bfloat16], ids=str)
@layouts
def test_bits_do_not_depend_on_the_number_of_tokens(
    cache_dtype: torch.dtype, angle_dtype: torch.dtype, is_neox: bool
) -> None:
    """On CUDA few tokens take another kernel than many, whose threads hold up to 4 heads each."""
    tokens, dims = 2200, (128, 96, 128)
    q, k, v = make_qkv(tokens, torch.bfloat16, dims)
    positions, angles = torch.randint(0, 50, (tokens,)), make_angles(dims[1]).to(angle_dtype)
    slots = torch.randperm(tokens)
    weight = torch.randn(dims[0]).bfloat16()
    options: dict[str, Any] = {"is_neox": is_neox, "q_weight": weight, "k_scale": 0.3}

    def run(step: int) -> list[torch.Tensor]:
        caches = [torch.zeros(tokens, 1, HK, 128).to(cache_dtype) for _ in "kv"]
        outs = [
            fi_backend.rope_append_to_cache(
                *(x[at : at + step] for x in (q, k, v, positions)),
                angles,
                (caches[0], caches[1]),
                slots[at : at + step],
                **options,
            )
            for at in range(0, tokens, step)
        ]
        return [torch.cat(outs), *(cache.float() for cache in caches)]

    for at_once, in_parts in zip(run(tokens), run(440), strict=True):
        assert torch.equal(at_once, in_parts)


@layouts
@pytest.mark.parametrize("form", ["NHD", "HND", "NHD pair", "HND pair"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_paged_form_writes_what_slots_do(dtype: torch.dtype, form: str, is_neox: bool) -> None:
    dims = (64, 64, 64)
    q, k, v = make_qkv(6, dtype, dims)
    pos_ids, angles = torch.tensor([40, 41, 0, 1, 2, 9]), make_angles(64)
    batch_indices = torch.tensor([0, 0, 2, 2, 2, -1], dtype=torch.int32)
    places = torch.tensor([4, 5, 0, 1, 2, 0], dtype=torch.int32)
    kv_indptr = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    kv_indices = torch.tensor([4, 1, 6, 2**31 - 1], dtype=torch.int32)
    layout = form[:3]
    size = (PAGE_SIZE, HK) if layout == "NHD" else (HK, PAGE_SIZE)
    paged = torch.zeros(PAGES, 2, *size, 64).to(dtype)
    out = fi_backend.rope_append_paged_kv_cache(
        q, k, v, pos_ids, angles, batch_indices, places,
        paged.unbind(1) if "pair" in form else paged,
        kv_indices, kv_indptr, layout, is_neox=is_neox, k_weight=torch.ones(64).to(dtype),
    )  # fmt: skip

    caches = (torch.zeros(PAGES, PAGE_SIZE, HK, 64).to(dtype) for _ in "kv")
    k_cache, v_cache = caches
    slots = torch.tensor([1 * PAGE_SIZE, 1 * PAGE_SIZE + 1, 24, 25, 26, -1])
    expected = fi_backend.rope_append_to_cache(
        q, k, v, pos_ids, angles, (k_cache, v_cache), slots,
        is_neox=is_neox, k_weight=torch.ones(64).to(dtype),
    )  # fmt: skip
    assert torch.equal(out, expected)
    for cache, want in zip(paged.unbind(1), (k_cache, v_cache), strict=True):
        assert torch.equal(cache if layout == "NHD" else cache.transpose(1, 2), want)


def test_scales_may_be_one_per_head() -> None:
    dims = (64, 64, 64)
    q, k, v = make_qkv(2, torch.bfloat16, dims)
    angles = torch.cat([torch.ones(4, 32), torch.zeros(4, 32)], -1)
    k_cache, v_cache = make_caches(torch.float8_e4m3fn, dims)
    scales = torch.tensor([0.5, 0.01])
    slots = torch.tensor([3, 9])
    fi_backend.rope_append_to_cache(
        q, k, v, torch.zeros(2).int(), angles, (k_cache, v_cache), slots,
        k_scale=scales, v_scale=scales,
    )  # fmt: skip
    for cache, rows in ((k_cache, k), (v_cache, v)):
        for token, slot in enumerate(slots.tolist()):
            stored = cache[slot // PAGE_SIZE, slot % PAGE_SIZE]
            assert_rounded_once(stored, rows[token].double() / scales[:, None].double())


@pytest.mark.parametrize("heads", [(1, 1), (8, 1), (71, 3), (32, 8)])
@pytest.mark.parametrize("tokens", [0, 1, 333])
def test_head_counts(heads: tuple[int, int], tokens: int) -> None:
    q, k = torch.randn(tokens, heads[0], 128), torch.randn(tokens, heads[1], 128)
    v = torch.randn_like(k)
    q_weight, k_weight = torch.randn(2, 128)
    positions, angles = torch.randint(0, 50, (tokens,)), make_angles(128)
    caches = tuple(torch.zeros(40, 16, heads[1], 128) for _ in "kv")
    slots = torch.randperm(640)[:tokens]
    out = fi_backend.rope_append_to_cache(
        q, k, v, positions, angles, caches, slots, q_weight=q_weight, k_weight=k_weight
    )
    k_exact = rotated(normalised(k, k_weight, 1e-6, 0.0), angles[positions], True)
    q_exact = rotated(normalised(q, q_weight, 1e-6, 0.0), angles[positions], True)
    torch.testing.assert_close(out.double(), q_exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        caches[0].flatten(0, 1)[slots].double(), k_exact, atol=1e-5, rtol=1e-5
    )
    assert torch.equal(caches[1].flatten(0, 1)[slots], v)


@on_cuda
def test_what_has_no_place_is_skipped() -> None:
    dims = (64, 64, 64)
    q, k, v = make_qkv(5, torch.bfloat16, dims)
    angles, caches = make_angles(64, 10), make_caches(torch.bfloat16, dims)
    positions = torch.tensor([1, 10, -1, 2, 3])
    slots = torch.tensor([2, 3, 4, PAGES * PAGE_SIZE, 2**40])
    out = torch.full_like(q, 5.0)
    fi_backend.rope_append_to_cache(q, k, v, positions, angles, caches, slots, out=out)
    exact = rotated(q, angles[positions.clamp(0, 9)], True)
    for token in (0, 3, 4):
        assert_rounded_once(out[token], exact[token])
    assert (out[1:3] == 5.0).all()
    written = (caches[1].flatten(0, 1) != 7.0).any(-1).any(-1)
    assert written.nonzero().flatten().tolist() == [2]


@on_cuda
def test_a_graph_replays_with_new_slots() -> None:
    dims = (128, 128, 128)
    q, k, v = make_qkv(4, torch.bfloat16, dims)
    angles, caches = make_angles(128), make_caches(torch.bfloat16, dims)
    positions, slots = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 3])
    out = torch.empty_like(q)

    def step() -> None:
        fi_backend.rope_append_to_cache(q, k, v, positions, angles, caches, slots, out=out)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    positions.copy_(torch.tensor([9, 8, 7, 6]))
    slots.copy_(torch.tensor([20, -1, 22, 23]))
    graph.replay()
    replayed = [out.clone(), *(cache.clone() for cache in caches)]
    step()
    for value, expected in zip(replayed, (out, *caches), strict=True):
        assert torch.equal(value, expected)
    assert_rounded_once(out, rotated(q, angles[positions], True))
    assert torch.equal(caches[1].flatten(0, 1)[slots[[0, 2, 3]]], v[[0, 2, 3]])


Change = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "query must be a torch.Tensor; got list", lambda a: {"query": [1.0]}),
        (TypeError, "key.* dtype .*bfloat16.* got .*float32", lambda a: {"key": a["key"].float()}),
        (ValueError, r"value.* shape .*\[3, 2, \*\].* got \[2, 2, 64\]", lambda a: {
            "value": a["value"][:2],
        }),
        (TypeError, "q_weight.* dtype .*bfloat16.* got .*float32", lambda a: {
            "q_weight": torch.ones(64),
        }),
        (ValueError, r"k_weight.* shape .*\[64\].* got \[32\]", lambda a: {
            "k_weight": torch.ones(32).bfloat16(),
        }),
        (ValueError, r"positions: shape must be \[3\], got \[2\]", lambda a: {
            "positions": a["positions"][:2],
        }),
        (TypeError, "cos_sin_cache.* dtype .*float32.*bfloat16.* got .*float16", lambda a: {
            "cos_sin_cache": a["cos_sin_cache"].half(),
        }),
        (ValueError, r"positions.* shape .*\[3\].* got \[2\]", lambda a: {
            "cos_sin_cache": a["cos_sin_cache"].bfloat16(), "positions": a["positions"][:2],
        }),
        (ValueError, r"value_cache: shape must be", lambda a: {
            "kv_cache": (a["kv_cache"][0], a["kv_cache"][1][..., :8]),
        }),
        (ValueError, "k_scale: must be above 0, got 0", lambda a: {
            "k_scale": 0.0, "kv_cache": make_caches(torch.float8_e4m3fn, (64, 64, 64)),
        }),
    ],
)  # fmt: skip
def test_bad_arguments_write_nothing(error: type[Exception], message: str, change: Change) -> None:
    q, k, v = make_qkv(3, torch.bfloat16, (64, 64, 64))
    arguments: dict[str, Any] = {
        "query": q,
        "key": k,
        "value": v,
        "positions": torch.arange(3),
        "cos_sin_cache": make_angles(64),
        "kv_cache": make_caches(torch.bfloat16, (64, 64, 64)),
        "slot_mapping": torch.arange(3),
        "out": torch.full_like(q, 5.0),
    }
    arguments |= change(arguments)
    with pytest.raises(error, match=message):
        fi_backend.rope_append_to_cache(**arguments)
    assert (arguments["out"] == 5.0).all()
    assert all((cache.float() == 7.0).all() for cache in arguments["kv_cache"])


@on_cpu
@pytest.mark.parametrize(
    ("message", "positions", "slots"),
    [
        (r"positions\[1\] = 50", [0, 50], [0, 1]),
        (r"positions\[0\] = -1", [-1, 0], [0, 1]),
        ("slot", [0, 1], [0, PAGES * PAGE_SIZE]),
    ],
)
@pytest.mark.parametrize("angle_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bad_indices_are_refused(
    message: str, positions: list[int], slots: list[int], angle_dtype: torch.dtype
) -> None:
    dims = (64, 64, 64)
    q, k, v = make_qkv(2, torch.bfloat16, dims)
    angles = make_angles(64).to(angle_dtype)
    caches, before = make_caches(torch.float32, dims), q.clone()
    with pytest.raises(ValueError, match=message):
        fi_backend.rope_append_to_cache(
            q, k, v, torch.tensor(positions), angles, caches, torch.tensor(slots), out=q
        )
    assert torch.equal(q, before)
    assert all((cache == 7.0).all() for cache in caches)
