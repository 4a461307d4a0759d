"""What a planner on the GPU is told about the kernels that will run its plans."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fi_backend import env
from fi_backend.kernels import mixed


@pytest.fixture(autouse=True)
def _asks_again() -> Iterator[None]:
    mixed.planned_kernels.cache_clear()
    yield
    mixed.planned_kernels.cache_clear()


@pytest.mark.parametrize(
    ("archs", "separate", "expected"),
    [
        ("9.0a", "0", (True, True)),
        ("8.0 9.0", "0", (True, True)),
        ("9.0a", "1", (True, False)),
        ("9.0+PTX", "0", (False, False)),  # no code for the instructions of sm_90a
        ("8.0+PTX", "0", (False, False)),
    ],
)
def test_follows_what_is_compiled(
    archs: str, separate: str, expected: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.CUDA_ARCH_LIST.name, archs)
    monkeypatch.setenv(env.SEPARATE_LAUNCHES.name, separate)
    assert mixed.planned_kernels() == expected
