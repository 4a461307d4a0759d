"""docs/api.md is what the docstrings say, and they say what a caller has to know."""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

import pytest
from api_reference import PAGE, methods, render

import fi_backend as fi


def calls() -> dict[str, Any]:
    """Every public function and method by its name; constructors are their class's."""
    found = {}
    for name in fi.__all__:
        value = getattr(fi, name)
        if not isinstance(value, type):
            found[name] = value.func if isinstance(value, functools.partial) else value
            continue
        found |= {f"{name}.{method}": function for method, function, _ in methods(value)}
    return found


CALLS = calls()


def documentation(name: str) -> str:
    """The docstring of a call, and of those that it refers to for the rest."""
    seen: dict[str, str] = {}
    pending = [name]
    while pending:
        one = pending.pop()
        if one in seen or one not in CALLS:
            continue
        text = seen[one] = inspect.getdoc(CALLS[one]) or ""
        owner = one.rpartition(".")[0]
        pending += re.findall(r":func:`(?:fi_backend\.)?([\w.]+)`", text)
        pending += [f"{owner}.{method}" for method in re.findall(r":meth:`(\w+)`", text)]
        # As in "those of Wrapper.plan()", "Wrapper's plan()", and "as for plan()" of the same one.
        mentioned = re.findall(r"(?:(\w+)(?:\.|'s\s+))?(\w+)\(\)", text)
        pending += [f"{other or owner}.{method}" for other, method in mentioned]
        pending += [f"{owner}.{method}" for _, method in mentioned]
    return "\n".join(seen.values())


def takes_tensors(function: Any) -> list[str]:
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if "Tensor" in str(parameter.annotation) or "PagedCache" in str(parameter.annotation)
    ]


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == render(), "run: .venv/bin/python scripts/api_reference.py"


@pytest.mark.parametrize("name", CALLS)
def test_every_call_documents_its_arguments_and_errors(name: str) -> None:
    text = documentation(name)
    assert text, "no docstring"
    parameters = inspect.signature(CALLS[name]).parameters.values()
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [p.name for p in parameters if p.kind not in starred and p.name not in ("self", "cls")]
    missing = [p for p in named if not re.search(rf"(?<![\w.]){p}\b", text)]
    assert not missing, f"{', '.join(missing)} are not documented"
    tensors = takes_tensors(CALLS[name])
    if tensors:
        assert re.search(r"\[[\w .*+/-]+(?:, [\w .*+()/-]+)*\]", text), "no shape"
        assert "Raises:" in text, "no errors"
