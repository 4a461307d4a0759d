"""The public names, and what importing them costs."""

from __future__ import annotations

import importlib
import subprocess
import sys

import fi_backend


def test_all_is_sorted_and_resolves() -> None:
    assert list(fi_backend.__all__) == sorted(fi_backend.__all__)
    for name in fi_backend.__all__:
        assert getattr(fi_backend, name) is not None
    assert set(fi_backend.__all__) <= set(dir(fi_backend))


def test_every_public_module_exports_what_it_lists() -> None:
    for module in sorted(set(fi_backend._MODULE_OF.values())):
        loaded = importlib.import_module(f"fi_backend.{module}")
        missing = [name for name in loaded.__all__ if not hasattr(loaded, name)]
        assert not missing, f"fi_backend.{module} lists {missing}"


def test_unknown_name_is_an_attribute_error() -> None:
    code = (
        "import fi_backend\ntry:\n    fi_backend.nothing\nexcept AttributeError as e:\n    print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "nothing" in done.stdout


def test_import_costs_at_most_50_ms() -> None:
    """Of several fresh interpreters the fastest counts, since other processes share the machine."""
    code = (
        "import time, torch\nstart = time.perf_counter()\nimport fi_backend\n"
        "print(time.perf_counter() - start)"
    )
    times = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        times.append(float(done.stdout))
    assert min(times) <= 0.050, times
