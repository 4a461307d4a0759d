"""The variants that docs/attention-variants.md shows, and what they mean in float64.

What the page says is what is tested.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fi_backend import AttentionVariant

Values = dict[str, Any]

_PAGE = Path(__file__).parent.parent / "docs" / "attention-variants.md"


def _variants() -> dict[str, AttentionVariant]:
    """Run the page's Python blocks, from first to last."""
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", _PAGE.read_text(), re.DOTALL | re.MULTILINE):
        exec(block, names)  # our own page
    return {name: value for name, value in names.items() if isinstance(value, AttentionVariant)}


_all = _variants()
BLOCK = 64  # tokens of a block of block_sparse


@dataclass(frozen=True)
class Request:
    """What a reference knows of one request.

    Attributes:
        index: in the batch.
        position: [qo_len, 1], of its query tokens among the keys.
        key: [1, kv_len].
    """

    index: int
    position: torch.Tensor
    key: torch.Tensor


@dataclass(frozen=True)
class Example:
    """A variant, values for a batch, and what it means in float64.

    `score` turns logits [num_heads, qo_len, kv_len] into logits, or weights without softmax, and
    into which keys are seen.
    """

    variant: AttentionVariant | None
    make_values: Callable[[int, int, int], Values]  # of a number of heads, requests and tokens
    score: Callable[[torch.Tensor, Request, Values], tuple[torch.Tensor, torch.Tensor | bool]]

    @property
    def uses_softmax(self) -> bool:
        return self.variant is None or self.variant.use_softmax


def biased(
    logits: torch.Tensor, request: Request, values: Values
) -> tuple[torch.Tensor, torch.Tensor | bool]:
    distance = (request.position - request.key).abs().double()
    return logits - values["slopes"].double()[:, None, None] * distance, True


def sigmoid(
    logits: torch.Tensor, request: Request, values: Values
) -> tuple[torch.Tensor, torch.Tensor | bool]:
    return torch.sigmoid(logits + values["bias"]), True


def random_blocks(
    _num_heads: int, num_requests: int, num_tokens: int, density: float = 0.5
) -> Values:
    num_blocks = -(-num_tokens // BLOCK)
    row_words = -(-num_blocks // 32)
    bits = torch.rand(num_requests, num_blocks, row_words, 32) < density
    words = (bits.long() << torch.arange(32)).sum(-1)
    words[:, 0] = 0  # the first query tokens of a sequence see nothing
    return {"bitmaps": words.int(), "num_blocks": num_blocks, "row_words": row_words}


def block_sparse(
    logits: torch.Tensor, request: Request, values: Values
) -> tuple[torch.Tensor, torch.Tensor | bool]:
    # Negative positions see no key anyway; indices would wrap.
    row, block = request.position.clamp(min=0) // BLOCK, request.key // BLOCK
    words = values["bitmaps"][request.index][row, block // 32]
    return logits, (words >> (block % 32) & 1).bool()


BUILT_IN = Example(None, lambda *_: {}, lambda logits, *_: (logits, True))
EXAMPLES = {
    "distance_bias": Example(
        _all["distance_bias"], lambda heads, *_: {"slopes": torch.rand(heads)}, biased
    ),
    "sigmoid": Example(_all["sigmoid"], lambda *_: {"bias": -2.5}, sigmoid),
    "block_sparse": Example(_all["block_sparse"], random_blocks, block_sparse),
}


def expected(
    requests: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    example: Example,
    values: Values,
    *,
    causal: bool = True,
    window_left: int = -1,
    custom_mask: list[torch.Tensor] | None = None,
    sinks: torch.Tensor | None = None,
    soft_cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and base-2 lse of every row by definition, in float64; lse is 0 without softmax.

    `requests` are (q, k, v), each [len, heads, head_dim].
    """
    states = []
    for index, (q, k, v) in enumerate(requests):
        qo_len, kv_len = len(q), len(k)
        group = q.shape[1] // k.shape[1]
        position = torch.arange(qo_len)[:, None] + kv_len - qo_len
        request = Request(index, position, torch.arange(kv_len)[None])
        keys, values_ = (x.double().repeat_interleave(group, 1) for x in (k, v))
        logits = torch.einsum("qhd,khd->hqk", q.double(), keys) / math.sqrt(q.shape[2])
        if soft_cap:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        scores, own = example.score(logits, request, values)
        seen = (request.key <= position) | (not causal)
        if window_left >= 0:
            seen = seen & (request.key >= position - window_left)
        seen = seen & own
        if custom_mask is not None:
            seen = seen & custom_mask[index]
        if example.uses_softmax:
            scores = scores.masked_fill(~seen, -math.inf)
            lse = scores.logsumexp(-1)
            if sinks is not None:
                lse = torch.logaddexp(lse, sinks.double()[:, None])
            empty = ~seen.any(-1)
            lse = lse.masked_fill(empty, -math.inf)
            weights = torch.exp(scores - lse[..., None]).masked_fill(empty[..., None], 0.0)
        else:
            weights = scores.masked_fill(~seen, 0.0)
            lse = torch.zeros(scores.shape[:2], dtype=torch.float64)
        states.append((torch.einsum("hqk,khd->qhd", weights, values_), lse.T / math.log(2)))
    return torch.cat([out for out, _ in states]), torch.cat([lse for _, lse in states])
