"""Run FlashInfer's own tests on this package: a pytest plugin.

    git clone https://github.com/flashinfer-ai/flashinfer /tmp/flashinfer
    export PYTHONPATH=$PWD:$PWD/scripts
    python -m pytest -c /dev/null --rootdir /tmp/flashinfer --noconftest -q -p flashinfer_suite \\
        --sample 8 --timeout 60 /tmp/flashinfer/tests/attention/test_alibi.py

A case is counted as

    passed, failed
    refused   by an error of ours that names what is not supported
    absent    it calls a name that is not here
    skipped   by itself, or because it needs a GPU, more memory or more time

Some cases need tens of GB; without a GPU, `ulimit -v` keeps them from taking a machine down.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter, defaultdict
from typing import Any

import flashinfer_stand_in
import pytest

from fi_backend.errors import UnsupportedError

OUTCOMES = ("passed", "refused", "absent", "skipped", "failed")
LEFT_OUT = "not in the sample"  # counted nowhere
TOO_LARGE = ("can't allocate memory", "Timeout (>", "CUDA support", "with CUDA enabled")

_counts: defaultdict[str, Counter[str]] = defaultdict(Counter)  # by file
_started = time.monotonic()
_done: Counter[str] = Counter()  # cases of each test that were not skipped


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sample", type=int, default=0, help="cases to run of each test; 0: all")
    parser.addoption("--seconds", type=float, default=math.inf, help="start no case after these")


def pytest_configure() -> None:
    flashinfer_stand_in.install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    random.Random(0).shuffle(items)
    items.sort(key=_file)
    if sample := config.getoption("--sample"):
        seen: Counter[str] = Counter()
        # Many more than the sample, since tests leave out parts of their grids.
        kept = []
        for item in items:
            seen[_test(item)] += 1
            if seen[_test(item)] <= 20 * sample:
                kept.append(item)
        items[:] = kept


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what is left of a test whose sample is complete, and of all tests in the end."""
    sample = item.config.getoption("--sample")
    is_late = time.monotonic() - _started > item.config.getoption("--seconds")
    if is_late or (sample and _done[_test(item)] >= sample):
        pytest.skip(LEFT_OUT)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if call.when == "call" or (call.when == "setup" and not report.passed):
        is_expected = call.excinfo is None or hasattr(report, "wasxfail")
        outcome = report.outcome if is_expected else _outcome(call.excinfo.value)
        _counts[_file(item)][outcome] += 1
        _done[_test(item)] += outcome not in ("skipped", LEFT_OUT)
    return report


def _file(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


def _test(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def _outcome(error: BaseException) -> str:
    if isinstance(error, UnsupportedError):
        return "refused"
    if isinstance(error, pytest.skip.Exception):
        if str(error) == LEFT_OUT:
            return LEFT_OUT
        return "absent" if str(error).startswith("absent: ") else "skipped"
    return "skipped" if any(reason in str(error) for reason in TOO_LARGE) else "failed"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"| file | {' | '.join(OUTCOMES)} |")
    for file, counts in sorted(_counts.items()):
        cells = " | ".join(str(counts[outcome]) for outcome in OUTCOMES)
        terminalreporter.write_line(f"| {file} | {cells} |")
