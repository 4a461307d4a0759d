"""Child process of the SGLang tests: run tasks in a real SGLang, one engine after another.

    python -m e2e.sglang_engine JOB.json RESULT.json

The parent (harness.py) writes the job and reads the result. SGLang finds our plugin by itself,
through its entry points: nothing here imports it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def run_task(task: dict[str, Any]) -> dict[str, Any]:
    """Run one engine over its batches; tokens as vLLM's child process returns them."""
    from sglang.srt.entrypoints.engine import Engine

    began = time.perf_counter()
    engine = Engine(
        model_path=task["model"],
        dtype=task["dtype"],
        attention_backend=task["backend"],
        skip_tokenizer_init=True,
        sampling_backend="pytorch",
        random_seed=0,
        log_level="info",
        **task["engine"],
    )
    start_seconds = time.perf_counter() - began
    try:
        return {
            "backend": engine.server_args.attention_backend,
            "page_size": engine.server_args.page_size,
            "start_seconds": start_seconds,
            "batches": [generate(engine, batch) for batch in task["batches"]],
        }
    finally:
        engine.shutdown()


def generate(engine: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Generate greedily from all prompts of a batch at once; `max_tokens` may differ."""
    most = batch["max_tokens"]
    lengths = most if isinstance(most, list) else [most] * len(batch["prompts"])
    sampling = [
        {"temperature": 0, "max_new_tokens": length, "ignore_eos": True} for length in lengths
    ]
    began = time.perf_counter()
    outputs = engine.generate(input_ids=batch["prompts"], sampling_params=sampling)
    return {
        "seconds": time.perf_counter() - began,
        "tokens": [output["output_ids"] for output in outputs],
        "cached_tokens": [output["meta_info"].get("cached_tokens", 0) for output in outputs],
    }


def main() -> None:
    job, result = Path(sys.argv[1]), Path(sys.argv[2])
    results = {}
    for task in json.loads(job.read_text()):
        print(f"== {task['name']}", flush=True)
        results[task["name"]] = run_task(task)
        result.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
