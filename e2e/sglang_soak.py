"""SGLang under the traffic of e2e.soak: random arrivals, aborts, retractions, prefix hits.

    python -m e2e.sglang_soak --minutes 8

The cache holds a part of what the requests want, so that SGLang retracts some. When it is idle, it
looks for lost slots itself, and ends if there are any. What else must hold is said in e2e.soak.
What has happened so far is written to benchmarks/results/<machine>/e2e_sglang_soak.json again and
again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import results_path
from e2e.conftest import FI_TINY
from e2e.harness import ROOT, end_in_order
from e2e.memory import family_bytes
from e2e.sglang_served import engine_environment
from e2e.sglang_site import CPU_ARGUMENTS
from e2e.soak import MAX_GROWN_BYTES, MOST_SECONDS, PROBE, Soak, teller

__all__ = ["PATIENCE_SECONDS", "main", "soak"]

_ROUTINE = "e2e_sglang_soak"
# For an engine's start, which may compile, and twice the most that few requests may take.
PATIENCE_SECONDS = 600 + 2 * MOST_SECONDS
_ENGINE: dict[str, Any] = {
    "max_total_tokens": 4096,  # a third of what 32 long requests want
    "max_running_requests": 32,
    "chunked_prefill_size": 256,
    "enable_mixed_chunk": True,
    "schedule_conservativeness": 0.1,  # begins more than the cache can hold to their ends
    "skip_tokenizer_init": True,
    "sampling_backend": "pytorch",
    "random_seed": 0,
    "log_level": "info",
}


@dataclass
class SGLangSoak(Soak):
    """Traffic for an engine of SGLang's, whose scheduler is a process of its own."""

    tasks: dict[str, asyncio.Task[Any]] = field(default_factory=dict)

    def _add(self, name: str, prompt: list[int], max_tokens: int) -> None:
        answer = self.engine.async_generate(
            input_ids=prompt,
            sampling_params={"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True},
            rid=_request_id(name),
        )
        self.tasks[name] = self.engine.loop.create_task(answer)
        self._alive.append(name)

    def _abort(self, name: str) -> None:
        self.engine.tokenizer_manager.abort_request(_request_id(name))

    def _step(self) -> None:
        self.engine.loop.run_until_complete(asyncio.sleep(0.003))
        for name in [name for name, task in self.tasks.items() if task.done()]:
            output = self.tasks.pop(name).result()
            if name not in self._alive:
                continue  # its client has hung up
            self._alive.remove(name)
            self.cached_tokens += output["meta_info"].get("cached_tokens", 0)
            if name == PROBE:
                self.probes.append(list(output["output_ids"]))
            else:
                self.finished += 1


def _request_id(name: str) -> str:
    """SGLang ends all requests whose ids begin with the one that it is told."""
    return f"{name}."


def soak_here(
    minutes: float, backend: str, page_size: int, tell: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Child process: start an engine, soak it, and return what happened; `tell` it now and then."""
    from sglang.srt.entrypoints.engine import Engine

    on_gpu = torch.cuda.is_available()
    engine = Engine(
        model_path=str(FI_TINY),
        dtype="bfloat16" if on_gpu else "float32",
        attention_backend=backend,
        page_size=page_size,
        **_ENGINE,
        **({} if on_gpu else CPU_ARGUMENTS),
    )
    result = SGLangSoak(engine).quarter_and_rest(minutes, family_bytes, tell)
    engine.loop.run_until_complete(asyncio.sleep(2.0))  # idle: it looks for lost slots
    engine.generate(input_ids=[5, 6, 7], sampling_params={"max_new_tokens": 4})
    engine.shutdown()
    return result


def soak(minutes: float, backend: str, page_size: int, log: Path, output: Path) -> dict[str, Any]:
    """Soak an engine in a process of its own, and return what happened.

    Args:
        minutes: of traffic.
        backend: as a user asks for it.
        page_size: tokens of a page of the cache.
        log: file for what the engine prints.
        output: JSON file for what has happened so far.

    Raises:
        RuntimeError: the engine has failed; the message is its log's tail.
    """
    words = ["--minutes", str(minutes), "--backend", backend, "--page-size", str(page_size)]
    words += ["--output", str(output.absolute())]
    with log.open("w") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "e2e.sglang_soak", *words, "--child"],
            cwd=ROOT,
            env=engine_environment({}),
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            start_new_session=True,
        )
        try:
            printed, _ = child.communicate(timeout=60 * minutes + PATIENCE_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # the scheduler is a process of its own
    text = log.read_text(errors="replace")
    found = re.search(r"^RESULT (.*)$", printed, re.MULTILINE)
    if child.returncode != 0 or found is None:
        tail = "\n".join(text.splitlines()[-20:])
        raise RuntimeError(f"the engine process ended with {child.returncode}:\n{tail}")
    counted = re.findall(r"Retract requests\..*#retracted_reqs: (\d+)", text)
    return {**json.loads(found[1]), "retracted": sum(map(int, counted))}


def main() -> None:
    """Parse the command line, soak, print the figures; exit with 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m e2e.sglang_soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--backend", default="fi_backend", help="as a user asks for it")
    parser.add_argument("--page-size", type=int, default=1, help="tokens of a page of the cache")
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/...")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    asked = (arguments.minutes, arguments.backend, arguments.page_size)
    tell = teller(_ROUTINE, arguments.backend, arguments.output)
    if arguments.child:
        print("RESULT", json.dumps(soak_here(*asked, tell)), flush=True)
        return
    end_in_order()
    output = arguments.output or results_path(_ROUTINE)
    with tempfile.TemporaryDirectory() as directory:
        result = soak(*asked, Path(directory) / "log.txt", output)
    tell(result)
    print(json.dumps(result, indent=1))
    grown = max(result["grown_bytes"].values())
    sys.exit(int(result["texts_of_probe"] != 1 or grown > MAX_GROWN_BYTES))


if __name__ == "__main__":
    main()
