"""Compare what two engines make of the same text, position by position."""

from __future__ import annotations

import math

from e2e.harness import first_differences

__all__ = ["Scores", "divergences", "gap_in_ulp", "token_divergences"]

Candidates = list[tuple[int, float]]  # (token, logit) of the best candidates, best first
Scores = list[list[Candidates]]  # of each position of each text


def _ulp(value: float) -> float:
    """Distance between bf16 numbers (8 bits of significand) at `value`."""
    return 2.0 ** (math.floor(math.log2(max(abs(value), 2.0**-126))) - 7)


def gap_in_ulp(candidates: Candidates, token: int) -> float:
    """How far below the best candidate `token` is, in bf16 ulp of the best one's logit."""
    top = candidates[0][1]
    return (top - dict(candidates).get(token, -math.inf)) / _ulp(top)


def divergences(want: Scores, got: Scores) -> list[float]:
    """For each position with another best token: how far `want` puts it from the best, in ulp."""
    return [
        gap_in_ulp(candidates, other[0][0])
        for positions, others in zip(want, got, strict=True)
        for candidates, other in zip(positions, others, strict=True)
        if other[0][0] != candidates[0][0]
    ]


def token_divergences(want: list[list[int]], scores: Scores, got: list[list[int]]) -> list[float]:
    """For each text that differs: how far `want` puts the first other token from its own, in ulp.

    Args:
        want: generated tokens.
        scores: of the positions of `want`.
        got: tokens generated from the same prompts. After the first other token the texts differ,
            and no more can be said.
    """
    return [
        gap_in_ulp(scores[text][position], got[text][position])
        for text, position in first_differences(want, got).items()
    ]
