"""The peers of the prefill benchmark, those of them that import: FlashInfer, vLLM's FA3, cuDNN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any

import torch

from benchmarks.peers import Call, load_peers
from benchmarks.prefill_steps import BF16, Cell, Step


def start_compiling(cells: Sequence[Cell], pool: Executor) -> list[Future[None]]:
    """Start compiling what FlashInfer needs for cells, each module in a thread.

    One after the other, as their first calls would, takes most of a minute each.
    """
    modules = {
        (backend, cell.head_dim, cell.window_left >= 0)
        for cell in cells
        if cell.head_dim in FLASHINFER_HEAD_DIMS
        for backend in FLASHINFER_BACKENDS
    }
    return [pool.submit(_compile_flashinfer, *module) for module in sorted(modules)]


def _compile_flashinfer(backend: str, head_dim: int, has_window: bool) -> None:
    try:
        from flashinfer.jit.attention import gen_batch_prefill_module

        types = (BF16, BF16, BF16, torch.int32)
        gen_batch_prefill_module(
            backend, *types, head_dim, head_dim, 0, has_window, False, False
        ).build_and_load()
    except (ImportError, RuntimeError, ValueError) as reason:  # as load() will say
        print(f"flashinfer {backend}, head_dim {head_dim}: {repr(reason)[:200]}")


def load(step: Step) -> dict[str, Call]:
    """Plan each peer for a step; return by name the call that returns its output."""
    return load_peers(PEERS, step)


def _flashinfer(backend: str, step: Step) -> Call:
    import flashinfer

    cell = step.cell
    if cell.head_dim not in FLASHINFER_HEAD_DIMS:
        raise NotImplementedError(f"measured at head_dim {FLASHINFER_HEAD_DIMS}")
    counts = (step.kv_lens.cpu() + cell.page_size - 1) // cell.page_size
    indptr = torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0, dtype=torch.int32)])
    workspace = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)
    wrapper.plan(
        step.qo_indptr.cpu(),
        indptr,
        step.block_table.flatten(),
        (step.kv_lens.cpu() - 1) % cell.page_size + 1,
        cell.num_qo_heads,
        cell.num_kv_heads,
        cell.head_dim,
        cell.page_size,
        causal=cell.causal,
        window_left=cell.window_left,
        q_data_type=step.q.dtype,
        kv_data_type=step.k.dtype,
    )
    return partial(wrapper.run, step.q, (step.k, step.v))


def _fa3(step: Step, **options: Any) -> Call:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    cell = step.cell
    return partial(
        flash_attn_varlen_func,
        step.q,
        max_seqlen_q=cell.qo_len,
        cu_seqlens_q=step.qo_indptr,
        max_seqlen_k=cell.context,
        causal=cell.causal,
        window_size=[cell.window_left, 0 if cell.causal else -1] if cell.window_left >= 0 else None,
        fa_version=3,
        **options,
    )


def _fa3_paged(step: Step) -> Call:
    return _fa3(step, k=step.k, v=step.v, seqused_k=step.kv_lens, block_table=step.block_table)


def _check_is_whole(step: Step) -> None:
    if step.cell.qo_len != step.cell.context:
        raise NotImplementedError("measured where all tokens are queries")


def _fa3_ragged(step: Step) -> Call:
    _check_is_whole(step)
    k, v = step.dense(step.k), step.dense(step.v)
    return _fa3(step, k=k, v=v, cu_seqlens_k=step.qo_indptr)


def _cudnn(step: Step) -> Call:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    _check_is_whole(step)
    cell = step.cell
    if cell.window_left >= 0:
        raise NotImplementedError("torch has no window")

    def heads_first(x: torch.Tensor) -> torch.Tensor:
        return x.view(cell.batch, cell.context, -1, cell.head_dim).transpose(1, 2)

    q, k, v = map(heads_first, (step.q, step.dense(step.k), step.dense(step.v)))

    def call() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=cell.causal, enable_gqa=True
            )
        return out.transpose(1, 2).flatten(0, 1)

    return call


FLASHINFER_BACKENDS = ("fa2", "fa3")
FLASHINFER_HEAD_DIMS = (64, 128, 256)  # of both; a module for others compiles in vain
PEERS: dict[str, Callable[[Step], Call]] = {
    **{f"flashinfer {name}": partial(_flashinfer, name) for name in FLASHINFER_BACKENDS},
    "fa3 paged": _fa3_paged,
    "fa3 ragged": _fa3_ragged,
    "cudnn": _cudnn,
}
