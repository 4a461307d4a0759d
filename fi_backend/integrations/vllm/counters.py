"""What this worker did, for those who want proof that our kernels served a request."""

from __future__ import annotations

from fi_backend import runtime_counters

__all__ = ["count_step", "read"]

_steps = 0
_layer_steps = 0


def count_step(num_layers: int) -> None:
    """Note that one step of `num_layers` layers was planned."""
    global _steps, _layer_steps
    _steps += 1
    _layer_steps += num_layers


def read() -> dict[str, int]:
    """Return the counters of this process.

    "attention_runs" is counted inside the native kernels' entry point, once per layer and step.
    "group_steps" and "layer_steps" are counted where steps are planned: of groups of layers, and of
    single layers. So attention_runs == layer_steps where every planned layer ran on our kernels.
    """
    return {**runtime_counters(), "group_steps": _steps, "layer_steps": _layer_steps}
