"""As engine.py, for engines whose workers are processes of their own: several of them.

    python -m e2e.engine_workers JOB.json RESULT.json

Nothing in a worker can be watched from here but its counters.
"""

from __future__ import annotations

from typing import Any

from e2e.engine import main, make_engine, release, run_batch


def run_task(task: dict[str, Any]) -> dict[str, Any]:
    # Scores would need a patch of the runner.
    engine = make_engine({**task, "engine": {"logprobs_mode": "raw_logprobs", **task["engine"]}})
    batches = [run_batch(engine, batch) for batch in task["batches"]]
    result = {"batches": batches, "counters": engine.collective_rpc("fi_backend_counters")}
    del engine
    release()
    return result


if __name__ == "__main__":
    main(run_task)
