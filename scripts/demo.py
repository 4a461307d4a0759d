#!/usr/bin/env python3
"""Serve models/fi-tiny with vLLM twice, on fi_backend and on the stock backend, and compare.

Everything goes over HTTP on the loopback interface, as for any client of the server.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models/fi-tiny"
EXTENSION = "fi_backend.integrations.vllm.worker_extension.WorkerExtension"
START_TIMEOUT_S = 300.0
SHOWN = (19, 24, 26)  # prompts whose text is streamed to the screen


@dataclass(frozen=True)
class Completion:
    """One finished request: its text and the ids of its tokens."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Server:
    """A running vLLM server."""

    port: int

    def post(self, path: str, body: dict[str, Any]) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"demo: {path} answered {response.status}: {response.read()!r}")
        return response

    def complete(self, prompt: str, max_tokens: int, *, show: bool = False) -> Completion:
        """Stream one greedy completion, printing it as it arrives if `show`."""
        body = {
            "model": "fi-tiny",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        text, tokens = "", []
        for line in self.post("/v1/completions", body):
            if not line.startswith(b"data: {"):
                continue
            choice = json.loads(line[len(b"data: ") :])["choices"][0]
            text += choice["text"]
            tokens += choice.get("token_ids") or []
            if show:
                print(choice["text"], end="", flush=True)
        return Completion(text, tuple(tokens))

    def counters(self) -> dict[str, int]:
        """Read the worker's counters; the stock run has them too, at zero."""
        answer = json.load(self.post("/collective_rpc", {"method": "fi_backend_counters"}))
        return dict(answer["results"][0])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_healthy(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False


def has_cuda_backend() -> bool:
    """Whether a GPU is here and this version of fi_backend has kernels for it."""
    import torch

    from fi_backend import AttentionSpec, supports

    spec = AttentionSpec(num_qo_heads=4, num_kv_heads=2, head_dim_qk=64, q_dtype=torch.bfloat16)
    return torch.cuda.is_available() and supports(spec, "cuda") is None


@contextlib.contextmanager
def serve(backend: str | None) -> Iterator[Server]:
    """Run `vllm serve` on a free port until the block ends; None is the stock backend."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(MODEL)]
    command += ["--served-model-name", "fi-tiny", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", "1024", "--worker-extension-cls", EXTENSION]
    if not has_cuda_backend():
        command += ["--dtype", "float32", "--enforce-eager"]
    if backend is not None:
        command += ["--attention-backend", backend]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_SERVER_DEV_MODE": "1",  # opens /collective_rpc
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process fewer to start
    }
    with tempfile.NamedTemporaryFile("w+", suffix=".log", prefix="fi-demo-") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not is_healthy(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    sys.stderr.write("".join(log.readlines()[-40:]))
                    raise SystemExit("demo: the server did not start; its last lines are above")
                time.sleep(0.2)
            yield Server(port)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@dataclass(frozen=True)
class Run:
    """What one server did."""

    completions: list[Completion]
    tokens_per_second: float
    counters: dict[str, int]
    start_seconds: float


def run(backend: str | None, prompts: list[str], max_tokens: int, *, show: bool) -> Run:
    name = backend or "stock"
    print(f"\n== {name}: starting the server", flush=True)
    began = time.monotonic()
    with serve(backend) as server:
        start_seconds = time.monotonic() - began
        print(f"== {name}: ready after {start_seconds:.0f} s", flush=True)
        for prompt in [prompts[index] for index in SHOWN if show]:
            print(f"\n>>> {prompt}", end="", flush=True)
            server.complete(prompt, 120, show=True)
            print()
        server.complete(prompts[0], 4)  # the timed part starts warm
        with ThreadPoolExecutor(len(prompts)) as pool:
            began = time.monotonic()
            done = list(pool.map(lambda prompt: server.complete(prompt, max_tokens), prompts))
            seconds = time.monotonic() - began
        rate = sum(len(one.tokens) for one in done) / seconds
        return Run(done, rate, server.counters(), start_seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=["vllm"], default="vllm")
    parser.add_argument("--max-tokens", type=int, default=128)
    arguments = parser.parse_args()
    prompts = json.loads((MODEL / "prompts.json").read_text())

    ours = run("flashinfer", prompts, arguments.max_tokens, show=True)
    stock = run(None, prompts, arguments.max_tokens, show=False)

    runs, planned = ours.counters["attention_runs"], ours.counters["layer_steps"]
    calls = ours.counters["layer_calls"]  # fewer than planned where steps replay CUDA graphs
    served = runs == calls > 0 and (calls == planned or has_cuda_backend())
    untouched = stock.counters["attention_runs"] == 0
    pairs = zip(ours.completions, stock.completions, strict=True)
    agreeing = sum(a.tokens == b.tokens for a, b in pairs)
    rows = (
        ("native attention calls, --attention-backend flashinfer", runs),
        ("layer calls by the engine there, captures included", calls),
        ("layers x steps that the engine planned there", planned),
        ("native attention calls, stock backend", stock.counters["attention_runs"]),
        ("output tokens/s, fi_backend", f"{ours.tokens_per_second:.0f}"),
        ("output tokens/s, stock backend", f"{stock.tokens_per_second:.0f}"),
        ("requests whose greedy tokens agree", f"{agreeing} of {len(prompts)}"),
    )
    print("\n== result")
    for label, value in rows:
        print(f"{label:<56}{value}")
    if not (served and untouched):
        raise SystemExit("demo: FAILED: the counters do not show that fi_backend served")
    if agreeing != len(prompts):
        raise SystemExit("demo: FAILED: greedy tokens differ from the stock backend's")


if __name__ == "__main__":
    main()
