"""Ranks with real collectives, each with its query heads and its share of a step's cache.

run_ranks() starts a process for each and returns, for every case, what went wrong in it.
"""

from __future__ import annotations

import importlib
import json
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.multiprocessing
from reference import Mask, attention

from tests.integrations.vllm_step import (
    DTYPE,
    LAYER,
    REQUESTS,
    Shape,
    Step,
    make_builder,
    make_impl,
    make_step,
)

RANKS = 2
EVERYONES = Shape(heads=6, kv_heads=1)
OURS = replace(EVERYONES, heads=EVERYONES.heads // RANKS)
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Case:
    """A layer, how tokens go round, and which of a step's requests there are."""

    interleave: int = 1
    requests: tuple[int, int] = (0, len(REQUESTS))
    sinks: bool = False
    impl: dict[str, Any] = field(default_factory=dict)
    mask: dict[str, Any] = field(default_factory=dict)
    causal: bool = True


def load_vllm(name: str) -> ModuleType:
    return importlib.import_module(f"vllm.{name}")


def share(step: Step, rank: int, interleave: int, dtype: torch.dtype) -> Step:
    """Return what a rank has of a step: its heads, and the tokens that are its own."""
    table, page = step.common.block_table_tensor, EVERYONES.page
    cache = torch.full_like(step.cache, float("nan"))
    slots = torch.full_like(step.common.slot_mapping, -1)
    for request, (tokens, total) in enumerate(REQUESTS):
        positions = torch.arange(total)
        mine = positions[positions // interleave % RANKS == rank]
        index = mine // (RANKS * interleave) * interleave + mine % interleave
        pages, offsets = table[request, index // page].long(), index % page
        is_new = mine >= total - tokens
        rows = torch.cat([step.keys[request], step.values[request]], -1)[mine]
        cache[pages[~is_new], :, offsets[~is_new]] = rows[~is_new]
        slots_of = slots[step.tokens(request)]
        slots_of[mine[is_new] - (total - tokens)] = (pages * page + offsets)[is_new]
    if dtype == FP8:
        cache = cache.to(FP8).view(torch.uint8)
    q = step.q[:, rank * OURS.heads : (rank + 1) * OURS.heads]
    return replace(step, q=q, cache=cache, common=step.common.replace(slot_mapping=slots))


def requests_of(step: Step, first: int, last: int) -> Any:
    """Return the metadata of a step with some of the requests alone."""
    common = step.common
    starts = common.query_start_loc[first : last + 1]
    return common.replace(
        query_start_loc=starts - starts[0],
        seq_lens=common.seq_lens[first:last],
        block_table_tensor=common.block_table_tensor[first:last],
        num_reqs=last - first,
        num_actual_tokens=int(starts[-1] - starts[0]),
        max_query_len=int(starts.diff().max()),
    )


def run_case(case: Case, rank: int) -> None:
    torch.manual_seed(0)
    everyones = make_step(load_vllm, shape=EVERYONES)
    dtype = FP8 if "kv_cache_dtype" in case.impl else DTYPE
    for rows in (*everyones.keys, *everyones.values):
        rows.copy_(rows.to(dtype))  # what the cache holds exactly
    step = share(everyones, rank, case.interleave, dtype)
    for request, (tokens, _) in enumerate(REQUESTS):
        if tokens:
            step.k[step.tokens(request)] = step.keys[request][-tokens:]
            step.v[step.tokens(request)] = step.values[request][-tokens:]
    arguments, mask = dict(case.impl), dict(case.mask)
    if case.sinks:
        sinks = torch.arange(EVERYONES.heads) / 2
        arguments["sinks"] = mask["sinks"] = sinks[rank * OURS.heads : (rank + 1) * OURS.heads]
    impl = make_impl(OURS, **arguments)
    builder = make_builder(load_vllm, {"layer": impl}, shape=OURS, interleave=case.interleave)
    common = requests_of(step, *case.requests)
    common.causal = case.causal
    metadata = builder.build(0, common)
    planned = dict(metadata.plans)

    impl.process_weights_after_loading(DTYPE)
    impl.do_kv_cache_update(LAYER, step.k, step.v, step.cache, step.common.slot_mapping)
    first, last = (int(step.common.query_start_loc[i]) for i in case.requests)
    rows = slice(first, len(step.k) if last == step.common.query_start_loc[-1] else last)
    q, k, v = step.q[rows], step.k[rows], step.v[rows]
    output = torch.full(q.shape, float("nan"))
    impl.forward(LAYER, q, k, v, step.cache, metadata, output=output)

    assert metadata.plans == planned, "a layer planned again"
    assert not output[last - first :].any(), "rows of padding"
    for request in range(*case.requests):
        if REQUESTS[request][0]:
            mine = step.tokens(request)
            keys, values = step.keys[request], step.values[request]
            want, _ = attention(
                step.q[mine], keys, values, Mask(causal=case.causal, **mask), sm_scale=OURS.scale
            )
            got = output[mine.start - first : mine.stop - first]
            torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-5)


def _rank_main(rank: int, cases: dict[str, Case], folder: Path) -> None:
    config, parallel = load_vllm("config"), load_vllm("distributed.parallel_state")
    torch.set_num_threads(1)
    with config.set_current_vllm_config(config.VllmConfig()):
        parallel.init_distributed_environment(
            RANKS, rank, f"file://{folder}/meeting", rank, backend="gloo"
        )
        parallel.initialize_model_parallel(RANKS, decode_context_model_parallel_size=RANKS)
    found = {}
    for name, case in cases.items():
        try:
            run_case(case, rank)
            found[name] = ""
        except Exception:  # the other rank is waiting for us in the next case
            found[name] = f"rank {rank}: {traceback.format_exc()}"
    (folder / f"{rank}.json").write_text(json.dumps(found))
    parallel.destroy_model_parallel()
    parallel.destroy_distributed_environment()


def run_ranks(cases: dict[str, Case], folder: Path) -> dict[str, list[str]]:
    """Run each case on all ranks; return their errors, "" for none."""
    torch.multiprocessing.spawn(_rank_main, (cases, folder), nprocs=RANKS)
    ranks: Iterable[dict[str, str]] = (
        json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)
    )
    found = list(ranks)
    return {name: [of_rank[name] for of_rank in found] for name in cases}
