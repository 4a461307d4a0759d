"""A worker extension with which vLLM's CPU workers run pipeline parallelism in eager steps.

vLLM 0.32 makes the tensors that a later stage receives when it warms a model up to compile it,
which it leaves out where nothing is compiled. This makes them with the model.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed import get_pp_group
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from fi_backend.integrations.vllm.worker_extension import WorkerExtension

__all__ = ["PipelineExtension"]

_load_model = CPUModelRunner.load_model


def _load_stage(runner: Any, *args: Any, **kwargs: Any) -> None:
    _load_model(runner, *args, **kwargs)
    if not get_pp_group().is_first_rank:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )


CPUModelRunner.load_model = _load_stage


class PipelineExtension(WorkerExtension):
    """The counters, and the tensors as a side effect of the import."""
