"""An engine under hours of traffic in minutes: random arrivals, aborts, preemptions, prefix hits.

    python -m e2e.soak --minutes 8              # SGLang's: python -m e2e.sglang_soak

The cache holds a part of what the requests want, so that the engine preempts. Every few seconds the
same prompt is asked again, alone among the others: its text must stay what it was (in bf16, where
company changes roundings, its first tokens). At the end all pages of the cache are free again and
the process has hardly grown. The CPU serves our trained model in fp32, a GPU the same in bf16.
What has happened so far is printed, and written to benchmarks/results/<machine>/e2e_vllm_soak.json,
again and again.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import results_path
from e2e.conftest import FI_TINY, fi_tiny_prompts
from e2e.engine import EXTENSION, StepLog, release
from e2e.harness import ENVIRONMENT
from e2e.served import without_compiling
from e2e.throughput import record

__all__ = ["MAX_GROWN_BYTES", "MOST_SECONDS", "PROBE", "PROBE_TOKENS", "Soak", "main", "teller"]

_PAGE = 32
_ENGINE: dict[str, Any] = {
    "max_model_len": 1024,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 256,
    "block_size": _PAGE,
    "num_gpu_blocks_override": 128,  # of 32 tokens: a third of what 32 long requests want
    "enable_prefix_caching": True,
    "skip_tokenizer_init": True,
    "generation_config": "vllm",
}
PROBE, PROBE_TOKENS = "probe", 32
_PROBE_SECONDS = 5.0  # from one to the next
_TOLD_SECONDS = 20.0  # from one time that it is said what has happened to the next
_MAX_WAITING = 48
# However slow the machine: enough traffic for preemptions, and an end of it.
_FEWEST_FINISHED = 24
MOST_SECONDS = 300.0
# An engine grows for some minutes by itself: by 130 MB in 2300 steps, with the stock backend too.
MAX_GROWN_BYTES = 256 << 20


@dataclass
class Soak:
    """Traffic for an engine in this process.

    Attributes:
        engine: a vllm.LLM.
        seed: of all that is random.
        finished: requests that ran to their end.
        aborted: requests that did not.
        cached_tokens: tokens of prompts that were found in the cache.
        probes: texts of the probe, as they came.
    """

    engine: Any
    seed: int = 0
    finished: int = 0
    aborted: int = 0
    cached_tokens: int = 0
    probes: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._prompts = fi_tiny_prompts()
        self._alive: list[str] = []
        self._added = 0

    def run(self, seconds: float, tell: Callable[[], None]) -> None:
        """Keep the engine busy for so long, then let it finish what it has.

        A machine on which too few requests finish in that time gets more.

        Args:
            seconds: how long.
            tell: called now and then.
        """
        begin = now = next_probe = time.monotonic()
        next_told = begin + _TOLD_SECONDS
        enough = self.finished + _FEWEST_FINISHED
        latest = begin + max(seconds, MOST_SECONDS)
        while now < begin + seconds or (
            now < latest and (self.finished < enough or self.aborted == 0)
        ):
            if now >= next_probe and PROBE not in self._alive:
                self._add(PROBE, self._prompts[0], PROBE_TOKENS)
                next_probe = now + _PROBE_SECONDS
            if now >= next_told:
                tell()
                next_told = now + _TOLD_SECONDS
            self._arrive()
            self._leave()
            self._step()
            now = time.monotonic()
        while self._alive:
            self._step()

    def quarter_and_rest(
        self,
        minutes: float,
        memory: Callable[[], dict[str, int]],
        tell: Callable[[dict[str, Any]], None],
    ) -> dict[str, Any]:
        """Run for so long, and return what happened.

        Args:
            minutes: in all; the first quarter fills pools and caches.
            memory: what is held, in bytes; what it grows by afterwards is returned.
            tell: called now and then with what has happened so far.
        """
        begin = time.monotonic()
        before: dict[str, int] = {}
        shown = 8 if torch.cuda.is_available() else PROBE_TOKENS

        def so_far() -> dict[str, Any]:
            held = memory()
            return {
                "minutes": (time.monotonic() - begin) / 60,
                "finished": self.finished,
                "aborted": self.aborted,
                "cached_tokens": self.cached_tokens,
                "probes": len(self.probes),
                "texts_of_probe": len({tuple(text[:shown]) for text in self.probes}),
                "grown_bytes": {name: held[name] - size for name, size in before.items()},
            }

        self.run(60 * minutes / 4, lambda: tell(so_far()))
        before.update(memory())
        self.run(60 * minutes * 3 / 4, lambda: tell(so_far()))
        return so_far()

    def _arrive(self) -> None:
        """Nothing, or a burst of requests; half of them begin as others did."""
        if self._random.random() > 0.15:
            return
        for _ in range(min(self._random.randint(1, 16), _MAX_WAITING - len(self._alive))):
            head, tail = (self._random.choice(some) for some in (self._prompts[:4], self._prompts))
            prompt = head * self._random.randint(1, 3) + tail[: self._random.randint(1, 40)]
            if self._random.random() < 0.5:
                prompt = [token % 250 + 3 for token in self._random.sample(range(1000), 60)] + tail
            self._added += 1
            self._add(str(self._added), prompt[:700], self._random.randint(1, 300))

    def _leave(self) -> None:
        """A client hangs up now and then, not so often that nobody is left."""
        victims = [name for name in self._alive if name != PROBE]
        rare = 4 * self.aborted <= self.finished  # by steps alone it is not where an engine is slow
        if victims and rare and self._random.random() < 0.02:
            name = self._random.choice(victims)
            self._abort(name)
            self._alive.remove(name)
            self.aborted += 1

    def _abort(self, name: str) -> None:
        self.engine.llm_engine.abort_request([name])

    def _add(self, name: str, prompt: list[int], max_tokens: int) -> None:
        from vllm import SamplingParams

        parameters = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        self.engine.llm_engine.add_request(name, {"prompt_token_ids": prompt}, parameters)
        self._alive.append(name)

    def _step(self) -> None:
        for output in self.engine.llm_engine.step():
            if not output.finished or output.request_id not in self._alive:
                continue
            self._alive.remove(output.request_id)
            self.cached_tokens += output.num_cached_tokens or 0
            if output.request_id == PROBE:
                self.probes.append(list(output.outputs[0].token_ids))
            else:
                self.finished += 1


def free_pages(engine: Any) -> int:
    """Pages of the cache that no request holds."""
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    return int(scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


def memory_bytes() -> dict[str, int]:
    """What the process holds now."""
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    held = {"host": resident_pages * mmap.PAGESIZE}
    if torch.cuda.is_available():
        held["gpu"] = torch.cuda.memory_reserved()
    return held


def soak(
    minutes: float, backend: str | None, tell: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Start an engine, soak it, and return what happened; `tell` is called with it now and then."""
    import vllm

    on_gpu = torch.cuda.is_available()
    memory = {"kv_cache_memory_bytes": 1 << 28, "gpu_memory_utilization": 0.1} if on_gpu else {}
    arguments = without_compiling({**_ENGINE, **memory, "enforce_eager": not on_gpu})
    engine = vllm.LLM(
        model=str(FI_TINY),
        dtype="bfloat16" if on_gpu else "float32",
        attention_backend=backend,
        worker_extension_cls=EXTENSION,
        **arguments,
    )
    log = StepLog(engine)
    free = free_pages(engine)
    traffic = Soak(engine)
    happened = traffic.quarter_and_rest(minutes, memory_bytes, tell)
    result = {
        **happened,
        **log.counts(),
        "pages_lost": free - free_pages(engine),
        "counters": engine.collective_rpc("fi_backend_counters")[0],
    }
    del engine, log, traffic
    release()
    return result


def teller(routine: str, backend: str, path: Path | None) -> Callable[[dict[str, Any]], None]:
    """Return what prints a line, and writes the row of a soak to `path`, by default in results."""
    file = path or results_path(routine)

    def tell(happened: dict[str, Any]) -> None:
        print("so far:", json.dumps(happened), flush=True)
        record([{"cell": "soak", "backend": backend, **happened}], file, routine=routine)

    return tell


def main() -> None:
    """Parse the command line, soak, print the figures; exit with 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m e2e.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--backend", default="flashinfer", help="as a user asks for it")
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/...")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    tell = teller("e2e_vllm_soak", arguments.backend, arguments.output)
    result = soak(arguments.minutes, arguments.backend, tell)
    tell(result)
    print(json.dumps(result, indent=1))
    wrong = result["pages_lost"] != 0 or result["texts_of_probe"] != 1
    sys.exit(int(wrong or max(result["grown_bytes"].values()) > MAX_GROWN_BYTES))


if __name__ == "__main__":
    main()
