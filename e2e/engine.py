"""Child process of the engine tests: run tasks in a real vLLM, one engine after another.

    python -m e2e.engine JOB.json RESULT.json

The parent (harness.py) writes the job and reads the result. vLLM finds our plugin by itself,
through its entry points: nothing here imports it.
"""

from __future__ import annotations

import gc
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

EXTENSION = "fi_backend.integrations.vllm.worker_extension.WorkerExtension"


@contextmanager
def zeroed_attention(active: bool) -> Iterator[None]:
    """Break our attention on purpose, to see that the comparison notices."""
    if not active:
        yield
        return
    from fi_backend.integrations.vllm.impl import FIAttentionImpl

    def zeros(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = kwargs["output"] if "output" in kwargs else args[6]
        return output.zero_()

    original = FIAttentionImpl.forward
    FIAttentionImpl.forward = zeros  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        FIAttentionImpl.forward = original  # type: ignore[method-assign]


@contextmanager
def forgotten_prefixes(active: bool) -> Iterator[None]:
    """Let requests see nothing of what they share: so it is noticed, and shown that they share."""
    if not active:
        yield
        return
    from fi_backend.shared_prefixes import SharedPrefixes

    original = SharedPrefixes.run

    def forget(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        found["prior_lse"].fill_(-math.inf)
        return found

    with patch.object(SharedPrefixes, "run", forget):
        yield


def runner_of(engine: Any) -> Any:
    """Return the model runner of an engine in this process."""
    core = engine.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner


def builders_of(runner: Any) -> list[Any]:
    """Return the metadata builders of a runner, one for each group of attention layers."""
    groups = [group for of_cache in runner.attn_groups for group in of_cache]
    return [group.get_metadata_builder(0) for group in groups]


class StepLog:
    """Wraps an engine's scheduler and runner to see which steps it made of the requests."""

    def __init__(self, engine: Any) -> None:
        core = engine.llm_engine.engine_core.engine_core
        self.runner = runner_of(engine)
        self.steps = self.decode = self.mixed = self.preemptions = self.largest = 0
        execute, preempt = self.runner.execute_model, core.scheduler._preempt_request

        def count_step(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            tokens = list(scheduled.num_scheduled_tokens.values())
            if tokens:
                self.steps += 1
                self.largest = max(self.largest, sum(tokens))
                self.decode += max(tokens) == 1
                self.mixed += min(tokens) == 1 and max(tokens) > 1
            return execute(scheduled, *args, **kwargs)

        def count_preemption(*args: Any, **kwargs: Any) -> Any:
            self.preemptions += 1
            return preempt(*args, **kwargs)

        self.runner.execute_model = count_step
        core.scheduler._preempt_request = count_preemption

    def attention_layers(self) -> list[str]:
        """Class names of the attention implementation of each layer."""
        layers = self.runner.compilation_config.static_forward_context.values()
        return [type(layer.impl).__name__ for layer in layers if hasattr(layer, "impl")]

    def counts(self) -> dict[str, int]:
        return {
            "steps": self.steps,
            "decode_steps": self.decode,
            "mixed_steps": self.mixed,
            "largest_step": self.largest,
            "preemptions": self.preemptions,
        }


def run_batch(engine: Any, batch: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": prompt} for prompt in batch["prompts"]]
    if batch["max_tokens"] == 0:
        found = engine.embed(prompts, use_tqdm=False)
        return {"embeddings": [list(output.outputs.embedding) for output in found]}
    # One number for all prompts, or one for each.
    most = batch["max_tokens"]
    parameters = [
        SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=batch.get("logprobs"),
            prompt_logprobs=batch.get("prompt_logprobs"),
        )
        for max_tokens in (most if isinstance(most, list) else [most] * len(prompts))
    ]
    start = time.perf_counter()
    outputs = engine.generate(prompts, parameters, use_tqdm=False)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "cached_tokens": [output.num_cached_tokens or 0 for output in outputs],
        "token_scores": [scores(output.outputs[0].logprobs) for output in outputs]
        if "logprobs" in batch
        else None,
        # The first token of a prompt has none.
        "scores": [scores(output.prompt_logprobs[1:]) for output in outputs]
        if "prompt_logprobs" in batch
        else None,
    }


def scores(positions: Any) -> list[list[tuple[int, float]]]:
    """For each position: (token, logit) of the best candidates, best first."""
    return [
        sorted(((token, entry.logprob) for token, entry in position.items()), key=lambda x: -x[1])
        for position in positions
    ]


def traced_kernels(run: Callable[[], Any]) -> dict[str, int]:
    """Count the GPU kernels of `run` by name, those of replayed graphs included."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return Counter(event.name for event in trace.events() if event.device_type == on_gpu)


def make_engine(task: dict[str, Any]) -> Any:
    import vllm

    defaults = {
        "enforce_eager": True,
        "logprobs_mode": "raw_logits",
        "max_model_len": 1024,
        "max_num_seqs": 32,
        "skip_tokenizer_init": True,
        "worker_extension_cls": EXTENSION,
    }
    arguments = {**defaults, **task["engine"]}
    engine = vllm.LLM(
        model=task["model"],
        dtype=task["dtype"],
        attention_backend=task["backend"],
        generation_config="vllm",
        **arguments,
    )
    if arguments["logprobs_mode"] == "raw_logits" and arguments.get("runner") != "pooling":
        # 0.25 scores prompts by log-probabilities in every mode.
        runner_of(engine).sampler.compute_logprobs = lambda logits: logits.float()
    return engine


def run_task(task: dict[str, Any]) -> dict[str, Any]:
    import vllm

    start = time.perf_counter()
    # Broken before the engine is made, or its CUDA graphs would hold the whole attention.
    with zeroed_attention(task["zero_attention"]), forgotten_prefixes(task["forget_prefixes"]):
        engine = make_engine(task)
        ready = time.perf_counter() - start
        log = StepLog(engine)
        before = engine.collective_rpc("fi_backend_counters")[0]
        batches = [run_batch(engine, batch) for batch in task["batches"]]
    after = engine.collective_rpc("fi_backend_counters")[0]
    result = {
        "version": vllm.__version__,
        "runner": type(log.runner).__module__,
        "ready_seconds": ready,
        "batches": batches,
        "layers": log.attention_layers(),
        "counters": {name: after[name] - before[name] for name in after},
        **log.counts(),
    }
    if task["traced"] is not None:
        kernels = traced_kernels(partial(run_batch, engine, task["traced"]))
        result["traced"] = {"kernels": kernels, "steps": log.steps - result["steps"]}
    del engine, log
    release()
    return result


def release() -> None:
    """Let go of an engine, so that the next one can start in this process."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def main(run: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Run each task of the job, and write what it returns."""
    job = json.loads(Path(sys.argv[1]).read_text())
    results = {task["name"]: run(task) for task in job}
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main(run_task)
