"""The latency run's own parts, against a server that answers slowly on purpose."""

from __future__ import annotations

import itertools
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="the client's package comes with vllm")

from e2e.harness import ROOT
from e2e.latency import measure, poisson_arrivals, rounds_of, row, start
from e2e.server import VLLM, Timing, flags, replay
from e2e.throughput import OURS
from e2e.workloads import find

FIRST, EACH, TOKENS = 0.08, 0.02, 6


class Slow(BaseHTTPRequestHandler):
    """Streams TOKENS tokens: the first after FIRST seconds, the others EACH apart."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        for token in range(TOKENS):
            time.sleep(EACH if token else FIRST)
            self.wfile.write(b'data: {"choices": []}\n\n')
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_tokens_are_timed_from_their_requests_arrival(url: str) -> None:
    arrivals = [0.0, 0.1, 0.3]
    timings = replay(url, VLLM, [([1, 2], TOKENS)] * 3, arrivals)
    for timing, arrival in zip(timings, arrivals, strict=True):
        assert timing.first >= FIRST
        taken = timing.first + (TOKENS - 1) * timing.each
        assert taken >= FIRST + (TOKENS - 1) * EACH
        assert timing.done >= arrival + taken - 1e-6


def test_each_token_is_timed_when_it_comes(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by 1 when it is read, as no machine's load changes."""
    monkeypatch.setattr("e2e.server.time", SimpleNamespace(perf_counter=itertools.count().__next__))
    (timing,) = replay(url, VLLM, [([1, 2], TOKENS)], [0.0])
    assert (timing.first, timing.each) == (1, 1)
    assert timing.done > TOKENS


def test_arrivals_are_poisson_and_the_same_for_all() -> None:
    arrivals = poisson_arrivals(4000, 20.0, seed=1)
    assert arrivals == poisson_arrivals(4000, 20.0, seed=1) != poisson_arrivals(4000, 20.0, seed=2)
    gaps = [after - before for before, after in zip([0.0, *arrivals], arrivals, strict=False)]
    assert min(gaps) >= 0
    assert statistics.mean(gaps) == pytest.approx(1 / 20, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(1 / 20, rel=0.1)


def test_rows_have_medians_and_tails() -> None:
    timings = [Timing(first=n / 1000, each=n / 10000, done=1.0) for n in range(101)]
    found = row(timings)
    assert found["ttft_p50_us"] == pytest.approx(50e3)
    assert found["ttft_p99_us"] == pytest.approx(99e3)
    assert found["tpot_p99_us"] == pytest.approx(9.9e3)


def test_arguments_become_flags() -> None:
    arguments = {"max_num_seqs": 8, "enforce_eager": True, "enable_prefix_caching": False}
    assert flags({**arguments, "compilation_config": {"mode": 0}}) == [
        *("--max-num-seqs", "8"),
        "--enforce-eager",
        "--no-enable-prefix-caching",
        *("--compilation-config", '{"mode": 0}'),
    ]


def test_answers_are_cut_short() -> None:
    workload = find("fi-tiny float32 32 prompts x 256")
    first, second = rounds_of(workload, 2, 16)
    assert len(first) == len(second) == 32
    assert {tokens for _, tokens in first} == {16}


def test_each_row_comes_as_it_is_measured(url: str) -> None:
    """The peak is the best peer's, and a load is a part of it."""
    servers: dict[str, Any] = {name: SimpleNamespace(url=url, api=VLLM) for name in (OURS, "stock")}
    requests = [([1, 2], TOKENS)] * 2
    rows = measure(servers, [requests, requests], [0.5])
    (peak, _), *loaded = [(row["requests_per_s"], row) for row in rows]
    assert 0 < peak < 2 / (FIRST + (TOKENS - 1) * EACH)
    assert [(row["cell"], row["backend"]) for _, row in loaded] == [
        ("all at once", "stock"),
        ("50% of peak", OURS),
        ("50% of peak", "stock"),
    ]
    assert all(row["ttft_p50_us"] >= 1e6 * FIRST for _, row in loaded)


def test_a_run_that_is_told_to_end_closes_what_it_has_started() -> None:
    text = """
from e2e.harness import end_in_order
end_in_order()
try:
    print("ready", flush=True)
    input()
finally:
    print("closed")
"""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", text], stdin=pipe, stdout=pipe, cwd=ROOT, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.terminate()
        assert child.stdout.read() == "closed\n"
    assert child.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("failing", ["stock", OURS])
def test_a_peer_that_does_not_start_is_left_out(
    failing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = []

    class Fake:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait(self) -> None:
            if self.name == failing:
                raise RuntimeError("out of memory")

        def close(self) -> None:
            closed.append(self.name)

    def starter(*_: object) -> dict[str, Any]:
        return {name: Fake(name) for name in (OURS, "stock")}

    workload = find("fi-tiny float32 32 prompts x 256")
    if failing == OURS:
        with pytest.raises(RuntimeError, match="out of memory"):
            start(workload, tmp_path, starter, [])
        assert {OURS, "stock"} <= set(closed)
        return
    assert list(start(workload, tmp_path, starter, [])) == [OURS]
    assert closed == ["stock"]
    assert "stock is not measured: out of memory" in capsys.readouterr().out
