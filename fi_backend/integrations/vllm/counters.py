"""What this worker did, for those who want proof that our kernels served a request."""

from __future__ import annotations

from fi_backend import runtime_counters

__all__ = ["count_call", "count_step", "read"]

_steps = 0
_layer_steps = 0
_layer_calls = 0


def count_step(num_layers: int) -> None:
    """Note that one step of `num_layers` layers was planned."""
    global _steps, _layer_steps
    _steps += 1
    _layer_steps += num_layers


def count_call() -> None:
    """Note that the engine called a layer to run its attention."""
    global _layer_calls
    _layer_calls += 1


def read() -> dict[str, int]:
    """Return the counters of this process.

    "group_steps" and "layer_steps" are counted where steps are planned: of groups of layers, and of
    single layers. "layer_calls" are calls of a layer, which a CUDA graph makes once, when it is
    captured: a step that replays one counts in layer_steps alone. "attention_runs" is counted in
    native code, where it runs a layer or launches its kernels. So attention_runs == layer_calls
    where every call ran on our kernels (twice that with decode context parallelism: cached tokens
    and new ones), and both are layer_steps where there are no graphs.
    """
    return {
        **runtime_counters(),
        "group_steps": _steps,
        "layer_steps": _layer_steps,
        "layer_calls": _layer_calls,
    }
