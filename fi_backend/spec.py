"""AttentionSpec: what is fixed for one attention layer, and what the kernels can do of it."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch

from fi_backend import env
from fi_backend.variants import AttentionVariant

__all__ = ["AttentionSpec", "Geometry", "supports"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_INTEGERS = (
    "num_qo_heads", "num_kv_heads", "head_dim_qk", "head_dim_vo", "page_size", "window_left"
)  # fmt: skip


@dataclass(frozen=True)
class _Limits:
    """What the kernels of one kind of device take."""

    device: str
    query_dtypes: tuple[torch.dtype, ...]
    mixes_dtypes: bool  # a cache of another float dtype than q
    head_dim_step: int
    max_head_dim: int
    rope: bool

    def cache_dtypes(self, q_dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        return (*(_FLOATS if self.mixes_dtypes else (q_dtype,)), *_FP8)


_LIMITS = {
    "cpu": _Limits("cpu", _FLOATS, mixes_dtypes=True, head_dim_step=8, max_head_dim=512, rope=True),
    "cuda": _Limits(
        "cuda",
        (torch.bfloat16, torch.float16),
        mixes_dtypes=False,
        head_dim_step=32,
        max_head_dim=256,
        rope=False,
    ),
}


@dataclass(frozen=True)
class Geometry:
    """The part of a spec that a plan depends on: layers that share it share one plan."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int
    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    page_size: int
    causal: bool
    window_left: int
    rope: bool
    may_share: bool  # logits depend on no position, so that requests may share pages
    shares_prefixes: bool  # those that do are looked for, on a GPU
    batch_invariant: bool


_geometries: dict[Geometry, Geometry] = {}


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """One attention layer. Hashable, so that layers which agree share kernels and plans.

    Attributes:
        num_qo_heads: query heads; any multiple of num_kv_heads.
        num_kv_heads: key/value heads.
        head_dim_qk: size of a query and key head.
        head_dim_vo: size of a value and output head; head_dim_qk if None.
        q_dtype: float32, bfloat16 or float16.
        kv_dtype: dtype of the cache: as q_dtype, or float8_e4m3fn, float8_e5m2; q_dtype if None.
        o_dtype: dtype of the output; q_dtype if None.
        page_size: tokens a page of the cache holds.
        causal: query row i of a request with qo_len rows and kv_len keys sees keys up to
            i + kv_len - qo_len.
        window_left: how many keys left of its own position a row sees; -1 for all of them.
        logits_soft_cap: c > 0 turns a logit x into c * tanh(x / c), before masking.
        sm_scale: factor on q . k; 1 / sqrt(head_dim_qk) if None.
        alibi: run() gets alibi_slopes, and slope * (key index - query row) joins each logit.
        sinks: run() gets sinks, one logit per query head that joins the softmax denominator.
        custom_mask: run() gets a packed mask, which takes the place of the causal one.
        rope_theta: > 0 rotates q and the unrotated keys inside the kernel (half-split layout); on
            the CPU alone.
        rope_scale: divides positions when rope_theta > 0.
        variant: functions of the caller's that change scores, masks, weights or outputs; run()
            gets the values of their tensors and scalars.
        batch_invariant: a query row's bits depend on its own request's tokens alone: neither on
            other requests nor on which of its rows are in the step. All rows then take the
            many-row kernel, uncut, which decodes more slowly.
        share_prefixes: on a GPU, plans look for requests with few query rows whose page tables
            begin with the same pages, which then attend to these once, where that saves more than
            it costs. FI_BACKEND_SHARED_PREFIX says otherwise for all layers, if it is set. Without
            effect where logits depend on positions (alibi, custom_mask, rope_theta, variant), and
            where batch_invariant.
        geometry: what plans depend on; equal geometries are one object, so that they compare fast.

    Raises:
        TypeError: a head count, head size, page_size or window_left is no integer.
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int = field(default=None)  # type: ignore[assignment]
    q_dtype: torch.dtype
    kv_dtype: torch.dtype = field(default=None)  # type: ignore[assignment]
    o_dtype: torch.dtype = field(default=None)  # type: ignore[assignment]
    page_size: int = 1
    causal: bool = True
    window_left: int = -1
    logits_soft_cap: float = 0.0
    sm_scale: float = field(default=None)  # type: ignore[assignment]
    alibi: bool = False
    sinks: bool = False
    custom_mask: bool = False
    rope_theta: float = 0.0
    rope_scale: float = 1.0
    variant: AttentionVariant | None = None
    batch_invariant: bool = False
    share_prefixes: bool = False
    geometry: Geometry = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.head_dim_vo is None:
            object.__setattr__(self, "head_dim_vo", self.head_dim_qk)
        for name in _INTEGERS:
            if type(getattr(self, name)) is not int:
                object.__setattr__(self, name, _integer(name, getattr(self, name)))
        defaults = {
            "kv_dtype": self.q_dtype,
            "o_dtype": self.q_dtype,
            "sm_scale": 1.0 / math.sqrt(self.head_dim_qk) if self.head_dim_qk > 0 else 1.0,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        may_share = not (
            self.alibi
            or self.custom_mask
            or self.rope_theta > 0
            or self.variant is not None
            or self.batch_invariant
        )
        asked = env.SHARED_PREFIX.get()
        geometry = Geometry(
            num_qo_heads=self.num_qo_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim_qk=self.head_dim_qk,
            head_dim_vo=self.head_dim_vo,
            q_dtype=self.q_dtype,
            kv_dtype=self.kv_dtype,
            page_size=self.page_size,
            causal=self.causal and not self.custom_mask,
            window_left=self.window_left,
            rope=self.rope_theta > 0,
            may_share=may_share,
            shares_prefixes=may_share and (self.share_prefixes if asked is None else asked),
            batch_invariant=self.batch_invariant,
        )
        object.__setattr__(self, "geometry", _geometries.setdefault(geometry, geometry))

    @property
    def kernel_types(self) -> dict[str, Any]:
        """What kernels are compiled for, as fi_backend.kernels.attention takes it."""
        return {
            "q_dtype": self.q_dtype,
            "kv_dtype": self.kv_dtype,
            "o_dtype": self.o_dtype,
            "head_dim_qk": self.head_dim_qk,
            "head_dim_vo": self.head_dim_vo,
            "variant": None if self.variant is None else self.variant.code,
            "many_rows_only": self.batch_invariant,
        }

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.num_qo_heads // self.num_kv_heads


def _integer(name: str, value: object) -> int:
    """Return what is an integer, of numpy for one, as an int."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an int; got {value!r}") from None


def _head_dim_reason(name: str, value: int, limits: _Limits) -> str | None:
    step, largest = limits.head_dim_step, limits.max_head_dim
    if 0 < value <= largest and value % step == 0:
        return None
    return f"{name} must be a multiple of {step} up to {largest} on {limits.device}; got {value}"


def _dtype_reason(
    name: str, value: torch.dtype, allowed: tuple[torch.dtype, ...], limits: _Limits
) -> str | None:
    if value in allowed:
        return None
    names = ", ".join(str(dtype) for dtype in allowed)
    return f"{name} must be one of {names} on {limits.device}; got {value}"


def supports(spec: AttentionSpec, device_type: str = "cpu") -> str | None:
    """Say why `spec` cannot run on `device_type`, or None if it can.

    This is the one place that knows limits; adapters ask it instead of repeating them.
    """
    if device_type not in _LIMITS:
        return f"device must be cpu or cuda; got {device_type}"
    limits = _LIMITS[device_type]
    if spec.num_kv_heads < 1 or spec.num_qo_heads < 1 or spec.num_qo_heads % spec.num_kv_heads:
        return (
            "num_qo_heads must be a positive multiple of num_kv_heads; "
            f"got num_qo_heads={spec.num_qo_heads}, num_kv_heads={spec.num_kv_heads}"
        )
    reasons = (
        _head_dim_reason("head_dim_qk", spec.head_dim_qk, limits),
        _head_dim_reason("head_dim_vo", spec.head_dim_vo, limits),
        _dtype_reason("q_dtype", spec.q_dtype, limits.query_dtypes, limits),
        _dtype_reason("kv_dtype", spec.kv_dtype, limits.cache_dtypes(spec.q_dtype), limits),
        _dtype_reason("o_dtype", spec.o_dtype, _FLOATS, limits),
    )
    for reason in reasons:
        if reason is not None:
            return reason
    if spec.page_size < 1:
        return f"page_size must be at least 1; got {spec.page_size}"
    if spec.window_left < -1:
        return f"window_left must be at least 0, or -1 for no window; got {spec.window_left}"
    if not math.isfinite(spec.sm_scale):
        return f"sm_scale must be finite; got {spec.sm_scale}"
    if not (spec.logits_soft_cap >= 0.0 and math.isfinite(spec.logits_soft_cap)):
        return f"logits_soft_cap must be finite and at least 0; got {spec.logits_soft_cap}"
    if not (0.0 <= spec.rope_theta < math.inf and 0.0 < spec.rope_scale < math.inf):
        return (
            "rope_theta must be finite and at least 0, and rope_scale finite and above 0; "
            f"got rope_theta={spec.rope_theta}, rope_scale={spec.rope_scale}"
        )
    if spec.rope_theta > 0.0 and not limits.rope:
        return (
            f"rope_theta must be 0 on {device_type}: rotate q and k before, with fi_backend's rope "
            f"functions; got {spec.rope_theta}"
        )
    if spec.rope_theta > 0.0 and spec.head_dim_qk % 2:
        return f"head_dim_qk must be even for rope; got {spec.head_dim_qk}"
    if spec.variant is not None and spec.alibi:
        return "alibi must be False with a variant: add the bias in the variant's logit()"
    if spec.variant is not None and not spec.variant.use_softmax and spec.sinks:
        return "sinks must be False with a variant that does not use softmax"
    return None
