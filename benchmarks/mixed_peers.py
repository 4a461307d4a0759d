"""The peers of the mixed benchmark, those of them that import: vLLM's FA3 and FlashInfer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.mixed_steps import BF16, HEAD_DIM, NUM_KV_HEADS, NUM_QO_HEADS, PAGE_SIZE, Step
from benchmarks.peers import Call, load_peers


def load(step: Step) -> dict[str, Call]:
    """Plan each peer for a step; return by name the call that returns its output."""
    return load_peers(PEERS, step)


def _fa3(step: Step) -> Call:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    qo_lens, contexts = zip(*step.cell.requests, strict=True)
    return lambda: flash_attn_varlen_func(
        step.q,
        step.k,
        step.v,
        max(qo_lens),
        step.qo_indptr,
        max(contexts),
        seqused_k=step.kv_lens,
        block_table=step.block_table,
        causal=True,
        fa_version=3,
    )


def _pages(step: Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the page table as FlashInfer wants it: indptr on the host, ids, last page lengths."""
    lens = step.kv_lens.cpu()
    counts = (lens + PAGE_SIZE - 1) // PAGE_SIZE
    indptr = torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0, dtype=torch.int32)])
    ids = [row[:n] for row, n in zip(step.block_table, counts.tolist(), strict=True)]
    return indptr, torch.cat(ids), (lens - 1) % PAGE_SIZE + 1


def _workspace() -> torch.Tensor:
    return torch.empty(512 << 20, dtype=torch.uint8, device="cuda")


def _batch_attention(step: Step) -> Call:
    import flashinfer

    indptr, ids, _ = _pages(step)
    wrapper = flashinfer.BatchAttention("NHD")
    wrapper.plan(
        step.qo_indptr,
        indptr.cuda(),
        ids,
        step.kv_lens,
        NUM_QO_HEADS,
        NUM_KV_HEADS,
        HEAD_DIM,
        HEAD_DIM,
        PAGE_SIZE,
        causal=True,
        q_data_type=BF16,
        kv_data_type=BF16,
    )
    return lambda: wrapper.run(step.q, (step.k, step.v))[0]


def _two_calls(step: Step) -> Call:
    import flashinfer

    count = step.cell.num_decodes
    if not 0 < count < len(step.cell.requests):
        raise NotImplementedError("measured where there are decodes and prefills")
    decodes, prefills = step.part(0, count), step.part(count, len(step.cell.requests))
    heads = (NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE)
    types = {"q_data_type": BF16, "kv_data_type": BF16}
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(), "NHD", use_tensor_cores=True
    )
    decode.plan(*_pages(decodes), *heads, **types)
    prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(), "NHD", backend="fa3")
    prefill.plan(prefills.qo_indptr.cpu(), *_pages(prefills), *heads, causal=True, **types)
    cache = (step.k, step.v)
    return lambda: (decode.run(decodes.q, cache), prefill.run(prefills.q, cache))


PEERS: dict[str, Callable[[Step], Call]] = {
    "fa3 paged": _fa3,
    "flashinfer batch": _batch_attention,
    "flashinfer two": _two_calls,
}
