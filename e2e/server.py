"""An engine's server as a process of its own, and a client that notes when each token comes."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.report import REPOSITORY
from e2e.harness import ENVIRONMENT
from e2e.workloads import Request

__all__ = ["VLLM", "Api", "Server", "Timing", "flags", "replay", "vllm_server"]

_NAME = "model"
_READY_SECONDS = 300.0
_END_SECONDS = 30.0
_VARIABLES = {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}  # as a server is by itself


@dataclass(frozen=True)
class Api:
    """How a server is asked for tokens, which it streams, an event for each.

    Attributes:
        path: of the URL.
        body: makes the request of a prompt and the number of tokens.
    """

    path: str
    body: Callable[[list[int], int], dict[str, Any]]


VLLM = Api(
    "/v1/completions",
    lambda prompt, tokens: {
        "model": _NAME,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
    },
)


@dataclass(frozen=True)
class Timing:
    """Of one request, in seconds.

    Attributes:
        first: from its arrival to its first token.
        each: from one later token to the next, on average.
        done: from the arrival of the first request of all to the last token of this one.
    """

    first: float
    each: float
    done: float


class Server:
    """An API server.

    Args:
        program: module that it runs, and its flags.
        api: how it is asked for tokens.
        log: file for what the server prints.
        variables: its environment.
    """

    def __init__(
        self, program: Sequence[str], api: Api, log: Path, variables: Mapping[str, str]
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.api = api
        self._log = log
        path = os.pathsep.join(filter(None, (str(REPOSITORY), variables.get("PYTHONPATH", ""))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", *program, "--host", "127.0.0.1", "--port", str(port)],
            env={**variables, "PYTHONPATH": path},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )

    def wait(self) -> None:
        """Wait until the server answers.

        Raises:
            RuntimeError: it has ended, or takes too long; the message is its log's tail.
        """
        asyncio.run(self._wait())

    async def _wait(self) -> None:
        end = time.monotonic() + _READY_SECONDS
        async with aiohttp.ClientSession() as session:
            while self._process.poll() is None and time.monotonic() < end:
                try:
                    async with session.get(self.url + "/health") as answer:
                        if answer.status == 200:
                            return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.2)
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"no server at {self.url}:\n{tail}")

    def close(self) -> None:
        """End the process, which has some time to do so by itself."""
        self._process.terminate()
        try:
            self._process.wait(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def vllm_server(
    folder: Path,
    dtype: str,
    backend: str | None,
    arguments: Mapping[str, Any],
    log: Path,
    environment: Mapping[str, str],
) -> Server:
    """Start `vllm serve`.

    Args:
        folder: the model's; with a tokenizer.
        dtype: of weights and activations.
        backend: as a user asks for it; None asks for nothing.
        arguments: of vllm.LLM, which become flags.
        log: file for what the server prints.
        environment: more variables of the process.
    """
    asked = {} if backend is None else {"attention_backend": backend}
    options = {"model": str(folder), "dtype": dtype, **asked, **arguments}
    # Not the `vllm` command: a CPU build's asks for the version of another distribution.
    program = ["vllm.entrypoints.openai.api_server", *flags(options | {"served_model_name": _NAME})]
    return Server(program, VLLM, log, {**os.environ, **_VARIABLES, **environment})


def flags(arguments: Mapping[str, Any]) -> list[str]:
    """Return an engine's arguments as they are written on a command line."""
    found = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return found


async def _stream(
    session: aiohttp.ClientSession,
    url: str,
    api: Api,
    request: Request,
    arrival: float,
    begin: float,
) -> Timing:
    prompt, tokens = request
    await asyncio.sleep(begin + arrival - time.perf_counter())
    sent = time.perf_counter()
    first = last = 0.0
    async with session.post(url + api.path, json=api.body(prompt, tokens)) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                last = time.perf_counter()
                first = first or last
    if not first:
        raise RuntimeError(f"{url} has answered without a token")
    return Timing(first - sent, (last - first) / max(tokens - 1, 1), last - begin)


def replay(
    url: str, api: Api, requests: Sequence[Request], arrivals: Sequence[float]
) -> list[Timing]:
    """Send each request at its arrival, in seconds from now; return their timings."""

    async def run() -> list[Timing]:
        limits = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=limits, timeout=timeout) as session:
            begin = time.perf_counter()
            both = zip(requests, arrivals, strict=True)
            return await asyncio.gather(
                *(_stream(session, url, api, request, arrival, begin) for request, arrival in both)
            )

    return asyncio.run(run())
