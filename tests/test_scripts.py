"""Scripts name what exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_sanitizer_script_runs_tests_that_exist() -> None:
    named = re.findall(r"(tests/\S+\.py)::(\w+)", (ROOT / "scripts/sanitize.sh").read_text())
    assert len(named) > 3
    for path, test in named:
        assert f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"
