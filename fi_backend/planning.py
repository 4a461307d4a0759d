"""plan(): divide one step's attention work among workers.

The work of a step is a line of (request, kv head, query tile, kv tile) cells. Every worker gets a
contiguous piece of about equal cost; a query tile that a boundary cuts leaves partial results,
which are merged in index order. So the load is balanced for any mix of lengths, and scratch memory
is bounded by the number of workers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fi_backend.batch import PagedBatch
from fi_backend.errors import UnsupportedError
from fi_backend.kernels import attention as attention_kernels
from fi_backend.kernels import device_plan, host_plan
from fi_backend.kernels.batch_check import check_batch
from fi_backend.outer_levels import OuterLevels, OuterStates, outer_floats
from fi_backend.shared_prefixes import (
    SharedPrefixes,
    are_looked_for,
    shared_bytes,
    shared_floats,
)
from fi_backend.spec import AttentionSpec, Geometry, supports
from fi_backend.workspace import Workspace

__all__ = ["Plan", "default_workers", "max_prior_rows", "plan", "workspace_bytes"]


@dataclass(frozen=True)
class Plan:
    """A step's division of work. Layers whose specs share a geometry share it, one after the other.

    Runs use its counters and its scratch memory, so two streams must not run one plan at once.

    Attributes:
        geometry: what the plan was made for; run() checks it against its spec.
        batch: the step's tensors; they must not change before the last run.
        buffer: int32 work line and piece table.
        partials: float32 scratch for the results of cut query tiles.
        workspace: what lent it.
        num_workers: workers the line was divided among.
        split_tokens: as given to plan().
        num_tokens: query rows that the batch covers; None on a GPU, where the host does not know.
        num_ragged_rows: rows of k and v that a ragged batch covers; 0 for a paged one, and on a
            GPU.
        looks_for_shares: whether steps are searched for pages that requests share.
        shares: what the step's requests share, as found or told; None if no step was searched yet.
    """

    geometry: Geometry
    batch: PagedBatch
    buffer: torch.Tensor
    partials: torch.Tensor
    workspace: Workspace
    num_workers: int
    split_tokens: int
    num_tokens: int | None
    num_ragged_rows: int
    looks_for_shares: bool = False
    shares: SharedPrefixes | OuterStates | None = None


def _partial_floats(
    spec: AttentionSpec, device: torch.device, num_workers: int, split_tokens: int
) -> int:
    return attention_kernels.partial_floats(
        device_type=device.type,
        num_workers=num_workers,
        split=split_tokens,
        **spec.kernel_types,
    )


# Pieces of the work for each thread of a CPU, which takes the next one when it is done with one:
# threads are never equally fast, and two halves take as long as the slower one.
_PIECES_PER_THREAD = 4

# By GPU: torch takes more than a microsecond to say how many multiprocessors one has.
_gpu_workers: dict[torch.device, int] = {}


def default_workers(device: torch.device) -> int:
    """Pieces for the threads of a CPU, or the few-row kernel's thread blocks that a GPU holds."""
    workers = _gpu_workers.get(device)
    if workers is not None:
        return workers
    if device.type != "cuda":
        return _PIECES_PER_THREAD * torch.get_num_threads()
    workers = 3 * torch.cuda.get_device_properties(device).multi_processor_count
    if device.index is not None:  # "cuda" alone is the current device, which changes
        _gpu_workers[device] = workers
    return workers


def workspace_bytes(
    spec: AttentionSpec,
    max_reqs: int,
    max_tokens: int,
    num_workers: int | None = None,
    device: torch.device | str = "cpu",
    split_tokens: int = 0,
) -> int:
    """Bytes that planning and running `spec` need at most, from capacities alone.

    Args:
        spec: the layer.
        max_reqs: most requests of a step.
        max_tokens: most query rows of a step; the bound does not grow with it.
        num_workers: as for plan().
        device: where the step runs.
        split_tokens: as for plan(); on a GPU, n > 0 needs more, and so does 0 for
            a spec that shares prefixes.
    """
    if max_reqs < 0 or max_tokens < 0:
        raise ValueError(
            f"max_reqs and max_tokens must be at least 0; got {max_reqs} and {max_tokens}"
        )
    device = torch.device(device)
    workers = default_workers(device) if num_workers is None else num_workers
    planner = host_plan if device.type == "cpu" else device_plan
    ints = planner.plan_buffer_ints(max_reqs=max_reqs, num_workers=workers)
    shared = 0
    if device.type == "cuda" and spec.geometry.shares_prefixes and split_tokens == 0:
        shared = shared_bytes(spec.geometry, max_reqs, workers, device)
    return 4 * (ints + _partial_floats(spec, device, workers, split_tokens)) + shared


def plan(
    spec: AttentionSpec,
    batch: PagedBatch,
    workspace: Workspace,
    *,
    into: Plan | None = None,
    num_workers: int | None = None,
    split_tokens: int = 0,
    share_prefixes: bool | None = None,
    outer: OuterLevels | None = None,
) -> Plan:
    """Divide the work of `batch` among workers.

    On a GPU this is one launch on the current stream: no length is read by the host, nothing is
    synchronised, and a CUDA graph that holds it plans anew whenever it is replayed. Lengths that
    decrease `qo_indptr` or are negative then count as empty.

    Args:
        spec: the layer, or any of the layers that share its geometry.
        batch: the step; validated here, before any kernel reads it.
        workspace: scratch memory on the batch's device.
        into: a plan whose buffer is refilled if it is large enough; its earlier contents are gone.
            Made for the same geometry in the same workspace, it saves a step most of the checks,
            and steps of up to its requests stay in its memory, as a CUDA graph needs it.
        num_workers: pieces to divide the work into, each for a thread of the CPU that is free or
            for a thread block of a GPU. None for four pieces a thread of torch's, or three
            blocks for each multiprocessor: work with many query rows is divided among a third.
        split_tokens: 0 balances freely. n > 0 cuts a request's keys only at multiples of n, and
            -1 never cuts them: either makes a request's bits independent of its batch mates. 0 for
            a spec that is batch_invariant, whose requests are never cut.
        share_prefixes: whether requests with few query rows whose page tables begin with the same
            pages attend to these once, where that saves more than it costs. None for what the
            spec says on a GPU, and False elsewhere. It is off with split_tokens, where logits
            depend on positions (ALiBi, custom masks, rope, variants), and with `outer`.
        outer: levels of keys before those of the batch, whose kv_lens count its own keys alone
            then. split_tokens must be 0, and on a GPU the batch's max_qo_len must be given: a
            request's rows, times query heads for each kv head, may be 32 at most, 16 if heads are
            wider than 128.

    Raises:
        UnsupportedError: `spec` cannot run on the batch's device.
        TypeError, ValueError: a tensor of the batch has a wrong dtype, shape, device or value.
    """
    device = batch.device
    workers = default_workers(device) if num_workers is None else num_workers
    geometry = spec.geometry
    if outer is not None:
        share_prefixes = False
    repeats = (
        into is not None
        and into.geometry is geometry
        and into.num_workers == workers
        and into.split_tokens == split_tokens
        and into.workspace is workspace
        and workspace.device == device
        and share_prefixes in (None, into.looks_for_shares)
        and isinstance(into.shares, OuterStates) == (outer is not None)
    )
    shares = None
    if into is not None and repeats:
        partials, shares, looks_for_shares = into.partials, into.shares, into.looks_for_shares
    else:
        _check_arguments(spec, device, workspace, workers, split_tokens)
        partials = workspace.partials(_partial_floats(spec, device, workers, split_tokens))
        if share_prefixes is None:
            share_prefixes = device.type == "cuda" and geometry.shares_prefixes
        looks_for_shares = share_prefixes and geometry.may_share and split_tokens == 0
    batch.validate(spec.page_size)
    on_host = batch.qo_indptr.is_cpu
    num_tokens = _check_values(batch, spec.page_size) if on_host else None
    if outer is not None:
        _check_outer(spec, batch, outer, split_tokens, on_host)

    if into is not None and repeats and batch.num_requests <= into.batch.num_requests:
        buffer = into.buffer
    else:
        buffer = _buffer(into, batch, workers)
    if outer is not None:
        if isinstance(shares, OuterStates) and shares.serves(outer):
            shares = shares.of(batch, outer)
        else:
            floats = _partial_floats(spec, device, workers, 0) + outer_floats(geometry, outer)
            partials = workspace.partials(floats)
            shares = OuterStates.allocate(spec, batch, outer, workers, partials)
    elif isinstance(shares, SharedPrefixes) and batch.num_requests <= shares.max_requests:
        shares = shares.of(batch)
    elif looks_for_shares and are_looked_for(batch):
        floats = _partial_floats(spec, device, workers, split_tokens)
        partials = workspace.partials(floats + shared_floats(geometry, batch.num_requests))
        shares = SharedPrefixes.allocate(spec, batch, workers, partials)
    else:
        shares = None
    made = Plan(
        geometry=geometry,
        batch=batch,
        buffer=buffer,
        partials=partials,
        workspace=workspace,
        num_workers=workers,
        split_tokens=split_tokens,
        num_tokens=num_tokens,
        num_ragged_rows=batch.num_ragged_rows if on_host else 0,
        looks_for_shares=looks_for_shares,
        shares=shares,
    )
    _fill(made)
    return made


def _fill(plan: Plan) -> None:
    """Divide the work of a plan's step, and find what its requests share."""
    geometry, batch, shares = plan.geometry, plan.batch, plan.shares
    if shares is not None and shares.is_active:
        shares.plan(geometry, plan.buffer, plan.num_workers)
        return
    make_plan: Callable[..., None] = device_plan.device_plan
    if batch.qo_indptr.is_cpu:
        make_plan = host_plan.host_plan
    make_plan(
        plan_buffer=plan.buffer,
        qo_indptr=batch.qo_indptr,
        kv_lens=batch.kv_lens,
        num_qo_heads=geometry.num_qo_heads,
        num_kv_heads=geometry.num_kv_heads,
        head_dim_qk=geometry.head_dim_qk,
        head_dim_vo=geometry.head_dim_vo,
        q_dtype=geometry.q_dtype,
        kv_dtype=geometry.kv_dtype,
        causal=geometry.causal,
        window_left=geometry.window_left,
        num_workers=plan.num_workers,
        split=-1 if geometry.batch_invariant else plan.split_tokens,
        many_rows_only=geometry.rope or geometry.batch_invariant,
    )


def _check_outer(
    spec: AttentionSpec, batch: PagedBatch, outer: OuterLevels, split_tokens: int, on_host: bool
) -> None:
    if split_tokens != 0:
        raise ValueError(f"split_tokens must be 0 with outer; got {split_tokens}")
    outer.check(spec, batch)
    if on_host:
        for level in outer.levels:
            _check_values(level, spec.page_size)
        return
    most = max_prior_rows(spec, batch.device)
    if batch.max_qo_len is None or batch.max_qo_len > most:
        raise ValueError(
            f"max_qo_len of a batch with outer levels must be at most {most} on a GPU; "
            f"got {batch.max_qo_len}"
        )


def max_prior_rows(spec: AttentionSpec, device: torch.device | str = "cpu") -> int:
    """Most query rows of a request that may come behind outer levels, 0 if none may."""
    device_type = torch.device(device).type
    if supports(spec, device_type) is not None:
        return 0
    packed = attention_kernels.max_prior_rows(device_type=device_type, **spec.kernel_types)
    return packed // (spec.num_qo_heads // spec.num_kv_heads)


def _buffer(into: Plan | None, batch: PagedBatch, workers: int) -> torch.Tensor:
    """Return the buffer of `into` if the batch's plan fits there, else a new one."""
    device = batch.device
    planner = host_plan if device.type == "cpu" else device_plan
    ints = planner.plan_buffer_ints(max_reqs=batch.num_requests, num_workers=workers)
    if into is not None and into.buffer.numel() >= ints and into.buffer.device == device:
        return into.buffer
    return torch.empty(ints, dtype=torch.int32, device=device)


def _check_arguments(
    spec: AttentionSpec, device: torch.device, workspace: Workspace, workers: int, split_tokens: int
) -> None:
    reason = supports(spec, device.type)
    if reason is not None:
        raise UnsupportedError(f"plan: {reason}")
    if workspace.device != device:
        raise ValueError(
            f"workspace must be on the batch's device {device}; got {workspace.device}"
        )
    if workers < 1:
        raise ValueError(f"num_workers must be at least 1; got {workers}")
    if split_tokens < -1:
        raise ValueError(f"split_tokens must be at least -1; got {split_tokens}")
    if split_tokens != 0 and spec.batch_invariant:
        raise ValueError(
            f"split_tokens must be 0 with a spec that is batch_invariant; got {split_tokens}"
        )


def _check_values(batch: PagedBatch, page_size: int) -> int:
    """Check offsets and lengths on the host; return the number of query rows."""
    return check_batch(
        qo_indptr=batch.qo_indptr,
        kv_lens=batch.kv_lens,
        max_kv_len=batch.max_kv_len(page_size),
        page_indptr=batch.page_indptr,
        num_page_indices=None if batch.page_indices is None else batch.page_indices.shape[0],
        page_size=page_size,
        max_qo_len=batch.max_qo_len,
    )
