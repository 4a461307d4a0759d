"""The memory that the steps of one builder plan into, reserved before the first of them."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakValueDictionary

import torch

from fi_backend import AttentionSpec, PagedBatch, Plan, Workspace, plan, workspace_bytes

__all__ = ["Reservation"]

# vLLM makes builders per group, micro-batch and drafter, and makes all of them twice. The steps of
# one engine run one after the other, so one scratch serves all its builders on a device, for as
# long as one of them lives. Engines of one process may run at the same time: to each its own.
_scratches: WeakValueDictionary[tuple[torch.device, int], Workspace] = WeakValueDictionary()


class Reservation:
    """Plan buffers for each of a builder's geometries, and scratch memory for their partials.

    A CUDA graph keeps the addresses it was captured with. So steps of up to `max_reqs` requests
    never allocate here, and a later builder that makes the shared scratch grow leaves us the old.

    Args:
        specs: one layer of each geometry, by its key.
        device: where the steps run.
        max_reqs: most requests of a step; more are served too, from memory of their own.
        engine: an object that builders whose steps run one after the other have in common; None
            for a builder whose steps run beside those of others.
    """

    def __init__(
        self,
        specs: Mapping[int, AttentionSpec],
        device: torch.device,
        *,
        max_reqs: int,
        engine: object | None,
    ) -> None:
        self._scratch = Workspace(device)
        self._engine = engine  # kept, so that its id is nobody else's
        if engine is not None:
            self._scratch = _scratches.setdefault((device, id(engine)), self._scratch)
        sizes = (workspace_bytes(spec, max_reqs, 0, device=device) for spec in specs.values())
        self._workspace = Workspace(buffer=self._scratch.partials(max(sizes, default=0) // 4))
        zeros = torch.zeros(max_reqs + 1, dtype=torch.int32, device=device)
        largest = PagedBatch(
            qo_indptr=zeros, kv_lens=zeros[:-1], block_table=zeros[:-1].unsqueeze(1)
        )
        self._plans = {key: plan(spec, largest, self._workspace) for key, spec in specs.items()}

    def plan(self, key: int, spec: AttentionSpec, batch: PagedBatch) -> Plan:
        """Plan a step; the plan that this key had before is gone.

        Args:
            key: the geometry's.
            spec: a layer with that geometry.
            batch: the step.
        """
        return plan(spec, batch, self._workspace, into=self._plans.get(key))
