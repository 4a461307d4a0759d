"""All templates, the definitions they give for a model, and the files these are written to."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fi_backend.spec import AttentionSpec
from fi_backend.trace import attention, cache, rope, rows
from fi_backend.trace.template import Tensor, TraceTemplate, dtype_name

__all__ = ["TEMPLATES", "model_definitions", "template_of", "write"]

TEMPLATES: tuple[TraceTemplate, ...] = (
    *attention.TEMPLATES,
    *cache.TEMPLATES,
    *rope.TEMPLATES,
    *rows.TEMPLATES,
)
_BY_CALL = {call: template for template in TEMPLATES for call in template.calls}


def template_of(call: str) -> TraceTemplate | None:
    """Return the template of a public call, as "rmsnorm" or "BatchAttention.run"; None if none."""
    return _BY_CALL.get(call)


def model_definitions(
    layer: AttentionSpec,
    hidden_size: int | None = None,
    quantized_dtype: torch.dtype = torch.float8_e4m3fn,
) -> list[dict[str, Any]]:
    """Return the definitions of every template for one model.

    Args:
        layer: an attention layer: heads, sizes, dtypes and page size. All of a head is rotated.
        hidden_size: elements of a hidden row; None: those of all query heads.
        quantized_dtype: dtype of quantised outputs.
    """
    heads = layer.num_qo_heads * layer.head_dim_qk
    sizes = {
        "num_qo_heads": layer.num_qo_heads,
        "num_kv_heads": layer.num_kv_heads,
        "num_heads": layer.num_qo_heads,
        "head_dim": layer.head_dim_qk,
        "head_dim_vo": layer.head_dim_vo,
        "rotary_dim": layer.head_dim_qk,
        "query_size": heads,
        "key_size": layer.num_kv_heads * layer.head_dim_qk,
        "hidden_size": hidden_size or heads,
        "double_hidden_size": 2 * (hidden_size or heads),
        "page_size": layer.page_size,
    }
    dtype = dtype_name(layer.q_dtype)
    special = {
        "k_cache": dtype_name(layer.kv_dtype),
        "out": dtype_name(quantized_dtype),
        "x": "bool",
    }

    def dtypes(template: TraceTemplate) -> dict[str, str]:
        return {
            name: special.get(name, dtype)
            for name, value in template.inputs.items()
            if isinstance(value, Tensor) and value.dtype == name
        }

    return [template.definition(sizes, dtypes(template)) for template in TEMPLATES]


def write(definition: Mapping[str, Any], directory: Path) -> Path:
    """Write a definition to ``<directory>/<op_type>/<name>.json``, whole or not at all."""
    path = directory / definition["op_type"] / f"{definition['name']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    scratch.write_text(json.dumps(definition, indent=2) + "\n", encoding="utf-8")
    os.replace(scratch, path)
    return path
