"""CPU attention against vLLM's own CPU kernels and torch's SDPA, in one process.

All peers see the same numbers in the layout each prefers: ours and vLLM's in an engine's paged
cache with pages in random order, SDPA's in dense tensors with no page table at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import fi_backend
from benchmarks.report import Row, print_row
from benchmarks.timing import interleaved
from fi_backend.integrations.vllm.huge_pages import advise_huge_pages
from tests.reference import Mask
from tests.reference import attention as reference_attention

PAGE_SIZE = 128  # vLLM's default on the CPU


@dataclass(frozen=True)
class Cell:
    """`batch` requests of `qo_len` new rows over `kv_len` keys."""

    kind: str
    batch: int
    qo_len: int
    kv_len: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        length = self.kv_len
        dtype = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}[self.dtype]
        heads = f"h{self.num_qo_heads}/{self.num_kv_heads}"
        return f"{self.kind} {self.batch}x{length} {heads} d{self.head_dim} {dtype}"

    def row(self, backend: str, seconds: float, err: float) -> Row:
        """Rate a time by what bounds the cell: bytes of KV for decode, arithmetic for prefill."""
        if self.kind == "decode":
            bytes_read = 2 * self.batch * self.kv_len * self.num_kv_heads * self.head_dim
            rate = bytes_read * self.dtype.itemsize / seconds / 1e9
            return Row(self.name, backend, seconds * 1e6, "gbs", rate, err)
        pairs = self.qo_len * self.kv_len - self.qo_len * (self.qo_len - 1) / 2
        flops = 4 * self.batch * self.num_qo_heads * self.head_dim * pairs
        return Row(self.name, backend, seconds * 1e6, "tflops", flops / seconds / 1e12, err)


def cells() -> list[Cell]:
    """Return every cell of the routine."""
    shapes = (("decode", 8, 1, 2048), ("decode", 32, 1, 512))
    shapes += (("prefill", 1, 1024, 1024), ("prefill", 4, 512, 512))
    return [
        Cell(*shape, *heads, head_dim, dtype)
        for dtype in (torch.bfloat16, torch.float32)
        for shape in shapes
        for heads in ((8, 2), (32, 8))
        for head_dim in (64, 128)
    ]


@dataclass(frozen=True)
class Problem:
    """Inputs of a cell: q [rows, Hq, D], dense k and v [tokens, Hkv, D], pages of each request."""

    cell: Cell
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    qo_indptr: torch.Tensor
    kv_lens: torch.Tensor
    block_table: torch.Tensor

    @property
    def slots(self) -> torch.Tensor:
        """Return the cache slot of every token."""
        token = torch.arange(self.cell.kv_len)
        pages = self.block_table[:, token // PAGE_SIZE].long()
        return (pages * PAGE_SIZE + token % PAGE_SIZE).flatten()


def make_problem(cell: Cell) -> Problem:
    """Draw a cell's inputs."""
    tokens = cell.batch * cell.kv_len
    pages = -(-cell.kv_len // PAGE_SIZE)
    shape = (tokens, cell.num_kv_heads, cell.head_dim)
    return Problem(
        cell,
        torch.randn(cell.batch * cell.qo_len, cell.num_qo_heads, cell.head_dim).to(cell.dtype),
        torch.randn(shape).to(cell.dtype),
        torch.randn(shape).to(cell.dtype),
        torch.arange(cell.batch + 1, dtype=torch.int32) * cell.qo_len,
        torch.full((cell.batch,), cell.kv_len, dtype=torch.int32),
        torch.randperm(cell.batch * pages, dtype=torch.int32).view(cell.batch, pages),
    )


Backend = Callable[[], torch.Tensor]


def ours(problem: Problem) -> Backend:
    """Run PagedAttention on vLLM's cache as our backend has it: [pages, heads, tokens, K | V]."""
    cell = problem.cell
    spec = fi_backend.AttentionSpec(
        num_qo_heads=cell.num_qo_heads,
        num_kv_heads=cell.num_kv_heads,
        head_dim_qk=cell.head_dim,
        q_dtype=cell.dtype,
        page_size=PAGE_SIZE,
        causal=True,
    )
    pages = problem.block_table.numel()
    shape = (pages, cell.num_kv_heads, PAGE_SIZE, 2 * cell.head_dim)
    cache = torch.empty(shape, dtype=cell.dtype).transpose(1, 2)
    advise_huge_pages(cache)
    k_cache, v_cache = cache[..., : cell.head_dim], cache[..., cell.head_dim :]
    for target, rows in ((k_cache, problem.k), (v_cache, problem.v)):
        target[problem.slots // PAGE_SIZE, problem.slots % PAGE_SIZE] = rows
    batch = fi_backend.PagedBatch(
        problem.qo_indptr, problem.kv_lens, block_table=problem.block_table
    )
    plan = fi_backend.plan(spec, batch, fi_backend.Workspace())
    layer = fi_backend.PagedAttention(spec)
    out = torch.empty_like(problem.q)
    return lambda: layer.run(plan, problem.q, (k_cache, v_cache), out=out)


def vllm_cpu_attn(problem: Problem) -> Backend | None:
    """Run vLLM's CPU_ATTN kernels as its backend does; None where vLLM's CPU build is missing."""
    try:
        from vllm import _custom_ops as ops
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
    except ImportError:
        return None
    if not current_platform.is_cpu():
        return None
    current_platform.import_kernels()
    cell = problem.cell
    isa = _get_attn_isa(cell.dtype, PAGE_SIZE, cell.head_dim)
    pages = problem.block_table.numel()
    shape = (pages, cell.num_kv_heads, 2 * PAGE_SIZE, cell.head_dim)
    key_cache, value_cache = torch.zeros(shape, dtype=cell.dtype).chunk(2, dim=2)
    slots = problem.slots
    ops.cpu_attn_reshape_and_cache(problem.k, problem.v, key_cache, value_cache, slots, isa)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=cell.batch,
        num_heads=cell.num_qo_heads,
        num_kv_heads=cell.num_kv_heads,
        head_dim=cell.head_dim,
        seq_lens=problem.kv_lens,
        dtype=cell.dtype,
        query_start_loc=problem.qo_indptr,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
    )
    out = torch.empty_like(problem.q)

    def run() -> torch.Tensor:
        ops.cpu_attention_with_kv_cache(
            query=problem.q,
            key_cache=key_cache,
            value_cache=value_cache,
            output=out,
            query_start_loc=problem.qo_indptr,
            seq_lens=problem.kv_lens,
            scale=1 / math.sqrt(cell.head_dim),
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=problem.block_table,
            softcap=0.0,
            scheduler_metadata=metadata,
            s_aux=None,
        )
        return out

    return run


def sdpa(problem: Problem, *, expand: bool) -> Backend:
    """Run torch's SDPA on dense tensors, with kv heads shared or repeated beforehand."""
    cell = problem.cell

    def heads_first(x: torch.Tensor) -> torch.Tensor:
        return x.view(cell.batch, -1, *x.shape[1:]).transpose(1, 2)

    group = cell.num_qo_heads // cell.num_kv_heads if expand else 1
    q = heads_first(problem.q)
    k = heads_first(problem.k).repeat_interleave(group, 1).contiguous()
    v = heads_first(problem.v).repeat_interleave(group, 1).contiguous()
    causal = cell.qo_len > 1

    def run() -> torch.Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=not expand
        )
        return out.transpose(1, 2).reshape(problem.q.shape)

    return run


def _reference(problem: Problem) -> torch.Tensor:
    cell = problem.cell
    outputs = []
    for r in range(cell.batch):
        rows = slice(r * cell.qo_len, (r + 1) * cell.qo_len)
        keys = slice(r * cell.kv_len, (r + 1) * cell.kv_len)
        out, _ = reference_attention(
            problem.q[rows],
            problem.k[keys],
            problem.v[keys],
            Mask(causal=True),
            sm_scale=1 / math.sqrt(cell.head_dim),
        )
        outputs.append(out)
    return torch.cat(outputs)


def run_cell(cell: Cell, seconds: float) -> list[Row]:
    """Check and time every backend on one cell; the time is the least of all rounds."""
    problem = make_problem(cell)
    candidates = {
        "fi_backend": ours(problem),
        "vllm cpu_attn": vllm_cpu_attn(problem),
        "sdpa gqa": sdpa(problem, expand=False),
        "sdpa expanded": sdpa(problem, expand=True),
    }
    backends = {name: run for name, run in candidates.items() if run is not None}
    reference = _reference(problem)
    errors = {
        name: float((run().double() - reference).abs().max()) for name, run in backends.items()
    }
    times = interleaved(backends, seconds=seconds)
    rows = [cell.row(name, min(times[name]), errors[name]) for name in backends]
    for row in rows:
        print_row(row, rows[0].us)
    return rows


def run(pattern: str, seconds: float) -> Iterator[list[Row]]:
    """Run the cells whose name contains `pattern`; yield the rows of each."""
    torch.manual_seed(0)
    for cell in cells():
        if pattern in cell.name:
            yield run_cell(cell, seconds)
