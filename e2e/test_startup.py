"""What the start-up run does around its engines, which are stand-ins here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

import fi_backend
from e2e import startup
from e2e.memory import our_bytes
from e2e.throughput import OURS, Backend
from e2e.workloads import CPU, Workload

WORKLOAD = CPU[0]
CONTENDERS = {OURS: Backend("flashinfer"), "stock": Backend(None, (("SOME", "1"),))}


class Engine:
    """Serves as `name`; the machine holds 100 bytes more once it has run a round."""

    alive: ClassVar[list[str]] = []
    held: ClassVar[int] = 1000

    def __init__(self, name: str) -> None:
        self._name = name
        Engine.alive.append(name)

    def warm_up(self, workload: Workload) -> None: ...

    def run(self, workload: Workload, number: int) -> dict[str, Any]:
        Engine.held += 100
        return {"counters": {"attention_runs": 5 if self._name == OURS else 0}}

    def close(self) -> None:
        Engine.alive.remove(self._name)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, str], Path]]:
    monkeypatch.setattr(startup, "family_bytes", lambda: {"gpu": Engine.held})
    return []


def run(started: list[Any], served_by: str | None = None) -> list[dict[str, Any]]:
    def start(contenders: dict[str, Backend], directory: Path) -> dict[str, Any]:
        assert Engine.alive == []
        assert directory.is_dir()
        ((name, backend),) = contenders.items()
        started.append((name, dict(backend.environment), directory))
        return {name: Engine(served_by or name)}

    return list(startup.measure(CONTENDERS, WORKLOAD, start))


def test_each_engine_starts_twice_alone_and_ours_last(started: list[Any]) -> None:
    rows = run(started)
    assert [(row["backend"], row["start"]) for row in rows] == [
        ("stock", "first"),
        ("stock", "second"),
        (OURS, "first"),
        (OURS, "second"),
    ]
    assert Engine.alive == []
    for row in rows:
        assert row["cell"] == WORKLOAD.model.name
        assert row["us"] > 0
        assert row["ready_bytes"] == {"gpu": 0}
        assert row["served_bytes"] == {"gpu": 100}
        assert row["builder_bytes"] is None  # as of an SGLang
    caches = {environment["FI_BACKEND_CACHE_DIR"] for _, environment, _ in started}
    assert len(caches) == 1  # empty before our first start
    assert started[0][1]["SOME"] == "1"
    assert len({directory for _, _, directory in started}) == 4


def test_another_backend_than_asked_for_is_noticed(started: list[Any]) -> None:
    with pytest.raises(RuntimeError, match="stock: another backend has served"):
        run(started, served_by=OURS)
    assert Engine.alive == []


def test_memory_of_ours_is_counted_once_and_no_other() -> None:
    scratch = torch.zeros(1000, dtype=torch.uint8)
    one = fi_backend.Workspace(buffer=scratch)
    two = fi_backend.Workspace(buffer=scratch[:500])
    other = SimpleNamespace(cache=torch.zeros(10_000))
    assert our_bytes([{"a": one, "b": [two, other]}, one]) == 1000
    assert our_bytes([other]) == 0
