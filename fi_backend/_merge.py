"""Merging attention states: what merge_state and its siblings check before the kernel runs.

CPU and CUDA tensors are served; a call's tensors are all on one device. On CUDA a call only
launches, on the current stream, and may be captured in a graph once a call with the same dtypes has
compiled or loaded the kernel.
"""

from __future__ import annotations

import torch

from fi_backend.checks import check_tensor
from fi_backend.kernels import merge as kernel
from fi_backend.torch_ops import register, runs_directly

__all__ = ["merge_state", "merge_state_in_place", "merge_states"]

_STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _merge_state_op(
    v_a: torch.Tensor,
    s_a: torch.Tensor,
    v_b: torch.Tensor,
    s_b: torch.Tensor,
    v: torch.Tensor,
    s: torch.Tensor,
) -> None:
    kernel.merge_pair(v_a=v_a, lse_a=s_a, v_b=v_b, lse_b=s_b, v_out=v, lse_out=s)


def _merge_state_in_place_op(
    v: torch.Tensor,
    s: torch.Tensor,
    v_other: torch.Tensor,
    s_other: torch.Tensor,
    mask: torch.Tensor | None,
) -> None:
    kernel.merge_pair(v_a=v, lse_a=s, v_b=v_other, lse_b=s_other, v_out=v, lse_out=s, mask=mask)


def _merge_states_op(
    v: torch.Tensor, s: torch.Tensor, v_out: torch.Tensor, s_out: torch.Tensor
) -> None:
    kernel.merge_states(v=v, lse=s, v_out=v_out, lse_out=s_out)


_merge_state = register(
    "merge_state(Tensor v_a, Tensor s_a, Tensor v_b, Tensor s_b, Tensor(a!) v, Tensor(b!) s) -> ()",
    _merge_state_op,
)
_merge_state_in_place = register(
    "merge_state_in_place(Tensor(a!) v, Tensor(b!) s, Tensor v_other, Tensor s_other, "
    "Tensor? mask) -> ()",
    _merge_state_in_place_op,
)
_merge_states = register(
    "merge_states(Tensor v, Tensor s, Tensor(a!) v_out, Tensor(b!) s_out) -> ()",
    _merge_states_op,
)


def _check_pair(v: torch.Tensor, s: torch.Tensor, names: tuple[str, str], rank: int) -> None:
    check_tensor(names[0], v, shape=(None,) * rank, dtype=_STATE_DTYPES, last_dim_contiguous=True)
    check_tensor(names[1], s, shape=tuple(v.shape[:-1]), dtype=torch.float32, device=v.device)


def _check_same(name: str, other: torch.Tensor, to: str, v: torch.Tensor) -> None:
    if other.shape != v.shape or other.dtype != v.dtype or other.device != v.device:
        raise ValueError(
            f"{name} must be like {to}, {v.dtype} {list(v.shape)} on {v.device}; "
            f"got {other.dtype} {list(other.shape)} on {other.device}"
        )


def merge_state(
    v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two attention states into one, as if one attention had seen the keys of both.

    Args:
        v_a, v_b: [num_rows, num_heads, head_dim]; float32, bfloat16 or float16.
        s_a, s_b: float32 [num_rows, num_heads], base 2.

    Returns:
        (v, s) of the same shapes; exactly (0, -inf) where both are empty.

    Raises:
        TypeError, ValueError: an argument is malformed; the message names it.
    """
    _check_pair(v_a, s_a, ("v_a", "s_a"), 3)
    _check_pair(v_b, s_b, ("v_b", "s_b"), 3)
    _check_same("v_b", v_b, "v_a", v_a)
    v = torch.empty(v_a.shape, dtype=v_a.dtype, device=v_a.device)
    s = torch.empty(s_a.shape, dtype=torch.float32, device=v_a.device)
    directly = runs_directly("merge_state", v_a=v_a, s_a=s_a, v_b=v_b, s_b=s_b)
    run = _merge_state.direct if directly else _merge_state.traced
    run(v_a, s_a, v_b, s_b, v, s)
    return v, s


def merge_state_in_place(
    v: torch.Tensor,
    s: torch.Tensor,
    v_other: torch.Tensor,
    s_other: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> None:
    """Merge another attention state into (v, s), in place.

    Args:
        v, v_other: [num_rows, num_heads, head_dim]; float32, bfloat16 or float16.
        s, s_other: float32 [num_rows, num_heads], base 2.
        mask: bool [num_rows], rows to merge; the others are left alone. All if None.

    Raises:
        TypeError, ValueError: an argument is malformed; the message names it.
    """
    _check_pair(v, s, ("v", "s"), 3)
    _check_pair(v_other, s_other, ("v_other", "s_other"), 3)
    _check_same("v_other", v_other, "v", v)
    if mask is not None:
        check_tensor(
            "mask", mask, shape=(v.shape[0],), dtype=(torch.bool, torch.uint8), device=v.device
        )
        mask = mask.view(torch.bool)  # the kernel takes any nonzero byte for True
    directly = runs_directly("merge_state_in_place", v=v, s=s, v_other=v_other, s_other=s_other)
    run = _merge_state_in_place.direct if directly else _merge_state_in_place.traced
    run(v, s, v_other, s_other, mask)


def merge_states(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the attention states of each row into one, in index order.

    Args:
        v: [num_rows, num_states, num_heads, head_dim]; float32, bfloat16 or float16.
        s: float32 [num_rows, num_states, num_heads], base 2.

    Returns:
        (v [num_rows, num_heads, head_dim], s [num_rows, num_heads]); (0, -inf) where all states
        are empty or there is none.

    Raises:
        TypeError, ValueError: an argument is malformed; the message names it.
    """
    _check_pair(v, s, ("v", "s"), 4)
    rows, _, heads, head_dim = v.shape
    v_out = torch.empty((rows, heads, head_dim), dtype=v.dtype, device=v.device)
    s_out = torch.empty((rows, heads), dtype=torch.float32, device=v.device)
    directly = runs_directly("merge_states", v=v, s=s)
    run = _merge_states.direct if directly else _merge_states.traced
    run(v, s, v_out, s_out)
    return v_out, s_out
