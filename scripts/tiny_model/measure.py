"""Figures of a trained model: bits per byte on text, and the spread of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F

from tiny_model.checkpoint import BOS_ID, FIRST_BYTE_ID


@torch.inference_mode()
def bits_per_byte(
    logits: Callable[[torch.Tensor], torch.Tensor],
    stream: torch.Tensor,
    *,
    context: int,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
) -> float:
    """Return the mean cost, in bits, of predicting each byte of ``stream``.

    The stream is cut into windows of ``context`` tokens that do not overlap, each predicted from
    a beginning of sequence and the window's own earlier tokens. Bytes count, ends of documents
    do not; a shorter last window is left out.

    Args:
        logits: maps int64 tokens ``[batch, context]`` to logits ``[batch, context, vocab]``.
        stream: int64 token ids ``[length]``, as ``corpus.token_stream`` returns them.
        context: tokens in a window, at most ``stream.numel()``.
    """
    num_windows = stream.numel() // context
    if num_windows == 0:
        raise ValueError(f"context must be at most {stream.numel()} (the stream), got {context}")
    windows = stream[: num_windows * context].view(num_windows, context)
    nats, count = 0.0, 0
    for targets in windows.to(device).split(batch_size):
        tokens = F.pad(targets[:, :-1], (1, 0), value=BOS_ID)
        cost = F.cross_entropy(logits(tokens).float().mT, targets, reduction="none")
        is_byte = targets >= FIRST_BYTE_ID
        nats += cost[is_byte].double().sum().item()
        count += int(is_byte.sum())
    return nats / count / math.log(2)


def matrix_stds(weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return the standard deviation of every weight matrix, by name."""
    return {
        name: round(weight.float().std().item(), 4)
        for name, weight in sorted(weights.items())
        if weight.dim() == 2
    }
