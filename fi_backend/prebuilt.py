"""Which kernels a package of prebuilt modules holds: those of a model, and of all public calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fi_backend.jit import KernelSpec
from fi_backend.kernels import host_plan, norm, packbits, rope
from fi_backend.warmup import model_layers, specs_for_model

__all__ = ["package_specs"]


def package_specs(config: Mapping[str, Any], device_type: str = "cpu") -> list[KernelSpec]:
    """List the kernels with which a machine without a compiler serves a model's public calls.

    They are those of :func:`fi_backend.warmup.specs_for_model`, and what only some callers reach:
    packed masks and checks on the host, norms that quantise, the fused rope-and-append step.

    Args:
        config: as for specs_for_model.
        device_type: "cpu" or "cuda".

    Raises:
        ValueError: a dimension is missing or the kernels do not support it.
    """
    specs = [*specs_for_model(config, device_type), host_plan.plan_spec(), packbits.packbits_spec()]
    dtype = model_layers(config, device_type)[0].q_dtype
    for out_dtype in norm.QUANTIZED:
        if device_type == "cuda":
            specs.append(norm.rmsnorm_cuda_spec(dtype, out_dtype))
            specs.append(norm.layernorm_cuda_spec(dtype, out_dtype))
        else:
            specs.append(norm.norm_spec(dtype, out_dtype))
    if device_type == "cpu":  # the parts of the fused step work in float32
        specs += [norm.norm_spec(torch.float32), rope.rope_spec(torch.float32)]
    return list(dict.fromkeys(specs))
