"""Rotary embedding of q and K ahead of attention, where its kernels do not rotate.

FlashInfer's "ROPE_LLAMA" keeps keys unrotated in the cache. Kernels of the CPU rotate the keys that
they have just loaded. Those of a GPU do not, so that every run there rotates copies first, which
costs a pass over the step's K and V: engines rotate a key once, before they append it.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fi_backend import env, jit
from fi_backend.attention import check_used_pages
from fi_backend.checks import check_tensor
from fi_backend.kernels.rope import rope_cuda_spec, rope_spec
from fi_backend.planning import Plan
from fi_backend.rope import apply_rope
from fi_backend.spec import AttentionSpec, supports

__all__ = ["KeyRotation", "split_rotation"]

_Cache = tuple[torch.Tensor, torch.Tensor]


def split_rotation(
    spec: AttentionSpec, device: torch.device
) -> tuple[AttentionSpec, KeyRotation | None]:
    """Return the layer that kernels of `device` run, and what rotates before, or None."""
    if spec.rope_theta == 0.0 or supports(spec, device.type) is None:
        return spec, None
    plain = replace(spec, rope_theta=0.0, rope_scale=1.0)
    if supports(plain, device.type) is not None:
        return plain, None  # whoever runs it says why not
    rotation = KeyRotation(spec)
    return rotation.spec, rotation


class KeyRotation:
    """Makes of each run of a layer with rope_theta a run without.

    Attributes:
        spec: the layer that is left: it rotates nothing, and its cache has the dtype of q, which an
            fp8 key takes on before it is rotated.
    """

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = replace(spec, rope_theta=0.0, rope_scale=1.0, kv_dtype=spec.q_dtype)
        self._rope_scale = spec.rope_scale
        self._rope_theta = spec.rope_theta
        self._checks_pages = env.CHECKED.get()

    def load(self, device: torch.device) -> None:
        """Compile or load what apply() launches; a CUDA graph cannot hold that."""
        make_spec = rope_cuda_spec if device.type == "cuda" else rope_spec
        jit.load(make_spec(self.spec.q_dtype))

    def apply(
        self, step: Plan, q: torch.Tensor, kv_cache: _Cache
    ) -> tuple[Plan, torch.Tensor, _Cache]:
        """Return what PagedAttention(self.spec).run() takes in the place of the arguments.

        Shapes depend on those of the arguments alone, and nothing waits for the device, so that a
        CUDA graph may hold it.

        Args:
            step: a plan for self.spec, of a CSR page table or ragged.
            q: as for PagedAttention.run().
            kv_cache: likewise, in the layer's dtype; not written.

        Raises:
            TypeError, ValueError: an argument does not fit the layer.
        """
        self._check(step, q, kv_cache)
        k, v = kv_cache
        if step.batch.page_indices is not None:
            step, k, v = self._gather(step, k, v)
        k, v = k.to(q.dtype), v.to(q.dtype)
        batch = step.batch
        assert batch.page_indptr is not None
        # Pages now lie in the order of the requests, so that the keys of each follow one another.
        first_keys = batch.page_indptr * self.spec.page_size
        keys = self._rotate(k.flatten(0, 1), first_keys, torch.zeros_like(batch.kv_lens))
        qo_lens = batch.qo_indptr[1:] - batch.qo_indptr[:-1]
        queries = self._rotate(q, batch.qo_indptr, batch.kv_lens - qo_lens)
        return step, queries, (keys.view(k.shape), v)

    def _rotate(
        self, rows: torch.Tensor, indptr: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Rotate rows [num_rows, num_heads, head_dim]; request r's first is at `positions[r]`."""
        rotated, _ = apply_rope(
            rows,
            rows[:, :0],
            indptr,
            positions,
            rope_scale=self._rope_scale,
            rope_theta=self._rope_theta,
        )
        return rotated

    def _check(self, step: Plan, q: torch.Tensor, kv_cache: _Cache) -> None:
        """Refuse what would go unnoticed in copies."""
        spec, (k, v) = self.spec, kv_cache
        page = (None, spec.page_size, spec.num_kv_heads)
        for name, tensor, shape in (
            ("q", q, (None, spec.num_qo_heads, spec.head_dim_qk)),
            ("k", k, (*page, spec.head_dim_qk)),
            ("v", v, (*page, spec.head_dim_vo)),
        ):
            check_tensor(
                name, tensor, shape=shape, device=step.batch.device, last_dim_contiguous=True
            )
        if k.shape[0] != v.shape[0]:
            raise ValueError(f"k and v must have as many pages; got {k.shape[0]} and {v.shape[0]}")

    def _gather(
        self, step: Plan, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[Plan, torch.Tensor, torch.Tensor]:
        """Copy the pages that a table names, in its order, one that it names twice twice.

        A page that requests share may stand at another position in each of them.
        """
        if self._checks_pages:
            check_used_pages(step, k.shape[0])
        pages = step.batch.page_indices
        assert pages is not None
        order = torch.arange(pages.shape[0], dtype=torch.int32, device=pages.device)
        # Entries past the last request's may hold anything; what they find is not attended to.
        pages = pages.clamp(0, k.shape[0] - 1)
        step = replace(step, batch=replace(step.batch, page_indices=order))
        return step, _take_pages(k, pages), _take_pages(v, pages)


def _take_pages(cache: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    if cache.dtype.itemsize > 1:
        return cache.index_select(0, pages)
    # Not every version of torch copies fp8 by index.
    return cache.view(torch.uint8).index_select(0, pages).view(cache.dtype)
