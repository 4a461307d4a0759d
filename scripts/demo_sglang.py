#!/usr/bin/env python3
"""Serve models/fi-tiny with SGLang twice, on fi_backend and on a stock backend, and compare.

Everything goes over HTTP on the loopback interface, as for any client of the server.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from e2e.server import Server  # noqa: E402
from e2e.sglang_server import sglang_server  # noqa: E402
from e2e.sglang_site import CPU_ARGUMENTS  # noqa: E402

MODEL = ROOT / "models/fi-tiny"
SHOWN = (19, 24, 26)  # prompts whose text is streamed to the screen
SERVES = "serves attention on"  # what fi_backend logs when SGLang makes it


@dataclass(frozen=True)
class Run:
    """What one server did."""

    tokens: list[list[int]]
    tokens_per_second: float
    served_by_us: bool


def generate(server: Server, prompt: str, max_tokens: int, *, show: bool = False) -> list[int]:
    """Stream one greedy answer, printing it as it arrives if `show`; return its tokens."""
    sampling = {"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True}
    body = {"text": prompt, "sampling_params": sampling, "stream": True}
    request = urllib.request.Request(
        server.url + "/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    last: dict[str, Any] = {"text": "", "output_ids": []}
    with urllib.request.urlopen(request, timeout=300) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            found = json.loads(line[len(b"data: ") :])
            if show:
                print(found["text"][len(last["text"]) :], end="", flush=True)
            last = found
    return list(last["output_ids"])


@contextmanager
def serve(backend: str, log: Path) -> Iterator[Server]:
    """Run SGLang's server on a free port until the block ends."""
    on_gpu = torch.cuda.is_available()
    arguments: dict[str, Any] = {"max_total_tokens": 16384, "max_running_requests": 32}
    if not on_gpu:
        arguments |= CPU_ARGUMENTS
    server = sglang_server(MODEL, "bfloat16" if on_gpu else "float32", backend, arguments, log, {})
    try:
        server.wait()
        yield server
    finally:
        server.close()


def run(backend: str, prompts: list[str], max_tokens: int, *, show: bool) -> Run:
    """Start a server, stream some texts to the screen, then ask everything at once."""
    print(f"\n== {backend}: starting the server", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "server.log"
        with serve(backend, log) as server:
            print(f"== {backend}: ready after {time.monotonic() - began:.0f} s", flush=True)
            for prompt in [prompts[index] for index in SHOWN if show]:
                print(f"\n>>> {prompt}", end="", flush=True)
                generate(server, prompt, 120, show=True)
                print()
            generate(server, prompts[0], 4)  # the timed part starts warm
            with ThreadPoolExecutor(len(prompts)) as pool:
                began = time.monotonic()
                tokens = list(pool.map(lambda text: generate(server, text, max_tokens), prompts))
                seconds = time.monotonic() - began
        served = SERVES in log.read_text(errors="replace")
    return Run(tokens, sum(map(len, tokens)) / seconds, served)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=["sglang"], default="sglang")
    parser.add_argument("--max-tokens", type=int, default=128)
    arguments = parser.parse_args()
    prompts = json.loads((MODEL / "prompts.json").read_text())
    stock_name = "triton" if torch.cuda.is_available() else "torch_native"

    ours = run("flashinfer", prompts, arguments.max_tokens, show=True)
    stock = run(stock_name, prompts, arguments.max_tokens, show=False)

    agreeing = sum(a == b for a, b in zip(ours.tokens, stock.tokens, strict=True))
    rows = (
        ("fi_backend serves, --attention-backend flashinfer", ours.served_by_us),
        (f"fi_backend serves, --attention-backend {stock_name}", stock.served_by_us),
        ("output tokens/s, fi_backend", f"{ours.tokens_per_second:.0f}"),
        (f"output tokens/s, {stock_name}", f"{stock.tokens_per_second:.0f}"),
        ("requests whose greedy tokens agree", f"{agreeing} of {len(prompts)}"),
    )
    print("\n== result")
    for label, value in rows:
        print(f"{label:<56}{value}")
    if not ours.served_by_us or stock.served_by_us:
        raise SystemExit("demo: FAILED: the logs do not show that fi_backend served")
    if agreeing != len(prompts) and not torch.cuda.is_available():
        raise SystemExit("demo: FAILED: greedy tokens differ from the stock backend's")


if __name__ == "__main__":
    main()
