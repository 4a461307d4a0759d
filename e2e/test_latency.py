"""The latency run's own parts, against a server that answers slowly on purpose."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

pytest.importorskip("aiohttp", reason="the client's package comes with vllm")

from e2e.latency import poisson_arrivals, rounds_of, row
from e2e.server import VLLM, Timing, flags, replay
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
