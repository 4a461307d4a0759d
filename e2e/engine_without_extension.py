"""As engine.py, for a vLLM wheel whose compiled extension does not load beside this torch.

    python -m e2e.engine_without_extension JOB.json RESULT.json

vLLM 0.25.1's CPU wheel was built for another torch, and 0.33.0 has a CUDA wheel only. Their Python
code, the part an attention plugin meets, runs on the CPU all the same once the few compiled
operators that every CPU engine calls exist. They are defined here, for tests alone.
"""

from __future__ import annotations

import torch

from e2e import engine

_LIBRARY = torch.library.Library("_C", "FRAGMENT")


def init_cpu_memory_env(nodes: list[int]) -> None:
    """Bind memory to NUMA nodes: not needed on a test machine."""


def compute_slot_mapping_kernel_impl(
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    block_table: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_size: int,
) -> None:
    """Write the cache slot of each scheduled token."""
    lengths = (query_start_loc[1:] - query_start_loc[:-1]).long()
    requests = torch.arange(lengths.shape[0]).repeat_interleave(lengths)
    tokens = positions[: requests.shape[0]].long()
    pages = block_table[requests, tokens // block_size].long()
    slot_mapping[: requests.shape[0]] = pages * block_size + tokens % block_size


def greedy_argmax(logits: torch.Tensor) -> torch.Tensor:
    """Return the index of the largest logit of each row."""
    return logits.argmax(dim=-1)


def define_missing() -> None:
    """Define the operators that the engine calls and this process lacks."""
    signatures = {
        init_cpu_memory_env: "(int[] nodes) -> ()",
        compute_slot_mapping_kernel_impl: (
            "(Tensor query_start_loc, Tensor positions, Tensor block_table, "
            "Tensor(a!) slot_mapping, int block_size) -> ()"
        ),
        greedy_argmax: "(Tensor logits) -> Tensor",
    }
    for function, signature in signatures.items():
        name = function.__name__
        if not hasattr(torch.ops._C, name):
            _LIBRARY.define(name + signature)
            _LIBRARY.impl(name, function, "CompositeExplicitAutograd")


if __name__ == "__main__":
    import vllm._custom_ops  # noqa: F401  (loads the extension where it can be loaded)

    define_missing()
    engine.main()
