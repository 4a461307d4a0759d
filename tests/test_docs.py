"""What the documentation names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fi_backend import env

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "fi_backend/csrc/README.md",
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    for link in links:
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_map_in_the_readme_names_real_files() -> None:
    text = (ROOT / "README.md").read_text()
    tree = text.split("## Where things are")[1].split("```")[1]
    folders = {"fi_backend": ROOT / "fi_backend"}
    names = 0
    for line in tree.strip().splitlines():
        base = folders["fi_backend"] if line.startswith("  ") else ROOT
        for name in re.findall(r"^\S+|(?<=\s)[\w./-]+(?:\.py|/)(?=\s|$)", line.strip()):
            assert (base / name).exists() or (ROOT / name).exists(), f"README names {name}"
            names += 1
    assert names > 20


def test_every_variable_named_in_the_docs_exists() -> None:
    known = {variable.name for variable in env.VARIABLES}
    for page in PAGES:
        named = set(re.findall(r"FI_BACKEND_(?!E2E)[A-Z_]*[A-Z]", page.read_text()))
        assert named <= known, f"{page.name} names {named - known}"
