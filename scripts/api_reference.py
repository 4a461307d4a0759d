"""Write docs/api.md, the reference of every public call, from docstrings.

.venv/bin/python scripts/api_reference.py
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import fi_backend
from fi_backend import testing, trace

PAGE = Path(__file__).resolve().parent.parent / "docs" / "api.md"

_HEADING = """\
# API reference

Every public name of `fi_backend`, from its docstring: shapes, dtypes, units and errors. Written by
`scripts/api_reference.py`; a test holds it against the code. [Coming from
FlashInfer](coming-from-flashinfer.md) says what differs from FlashInfer's calls of the same name.
"""
_SECTIONS = ("Args", "Attributes", "Returns", "Raises")
_MAX_LINE = 100
# The engine-facing core first, then FlashInfer's calls by what they do.
_ORDER = (
    (
        "The core",
        (
            "spec",
            "batch",
            "outer_levels",
            "planning",
            "workspace",
            "attention",
            "step_tables",
            "warmup",
        ),
    ),
    ("Attention", ("decode", "prefill", "batch_attention", "cascade")),
    ("Custom attention variants", ("variants",)),
    ("The paged cache", ("page", "rope_append")),
    ("Norms, rope, activations", ("norm", "rope", "activation")),
    ("Masks", ("quantization",)),
    ("Questions", ("capabilities",)),
)
# Public, but not imported with the package.
_TOOLS = ((testing, "bench_gpu_time"), (trace, "model_definitions"), (trace, "write"))


def render() -> str:
    """Return the page."""
    modules = fi_backend._MODULE_OF
    placed = {module for _, group in _ORDER for module in group}
    unplaced = sorted(set(modules.values()) - placed)
    assert not unplaced, f"_ORDER lacks {', '.join(unplaced)}"
    parts = [_HEADING]
    for title, group in _ORDER:
        names = [name for module in group for name in modules if modules[name] == module]
        if names:
            parts += [f"## {title}\n", *(_entry(name, getattr(fi_backend, name)) for name in names)]
    parts.append("## Tools\n")
    for module, name in _TOOLS:
        path = f"{module.__name__.removeprefix('fi_backend.')}.{name}"
        parts.append(_entry(path, getattr(module, name)))
    return "\n".join(parts)


def _entry(name: str, value: Any) -> str:
    if isinstance(value, type):
        return _class(name, value)
    if isinstance(value, functools.partial):
        given = ", ".join(f"{key}={item!r}" for key, item in value.keywords.items())
        return f"### {name}\n\n`{value.func.__name__}` with `{given}`.\n"
    return f"### {name}\n\n{_function(name, value)}"


def _class(name: str, cls: type) -> str:
    signature = "" if is_dataclass(cls) else _code(_signature(name, cls.__init__, is_method=True))  # type: ignore[misc]
    parts = [f"### {name}\n", signature, _markdown(inspect.getdoc(cls) or "")]
    first_names: dict[int, str] = {}
    inherited: dict[str, list[str]] = {}
    for method, function, owner in methods(cls):
        if owner.__name__ in fi_backend.__all__ and owner is not cls:
            inherited.setdefault(owner.__name__, []).append(method)
        elif id(function) in first_names:
            parts.append(f"#### {name}.{method}\n\nThe same as `{first_names[id(function)]}`.\n")
        else:
            first_names[id(function)] = method
            parts.append(f"#### {name}.{method}\n\n{_function(method, function, is_method=True)}")
    for owner_name, names in inherited.items():
        listed = ", ".join(f"`{method}`" for method in names)
        parts.append(f"As in `{owner_name}`: {listed}.\n")
    return "\n".join(filter(None, parts))


def methods(cls: type) -> Iterator[tuple[str, Any, type]]:
    """Yield public methods with their names and the classes that define them, aliases last."""
    found = []
    for owner in cls.__mro__:
        if owner.__module__.startswith("fi_backend"):
            for name, value in vars(owner).items():
                function = getattr(value, "__func__", value)
                if not name.startswith("_") and inspect.isfunction(function):
                    found.append((name, function, owner))
    seen = set()
    for name, function, owner in sorted(found, key=lambda item: item[0] != item[1].__name__):
        if name not in seen:
            seen.add(name)
            yield name, function, owner


def _function(name: str, function: Any, is_method: bool = False) -> str:
    text = _markdown(inspect.getdoc(function) or "")
    return f"{_code(_signature(name, function, is_method))}\n{text}"


def _code(text: str) -> str:
    return f"```python\n{text}\n```\n"


class _Plain(str):
    """Text that stands in a signature without quotes."""

    __repr__ = str.__str__


def _signature(name: str, function: Any, is_method: bool = False) -> str:
    """Return a signature on one line, or with one parameter on each where it is long."""
    signature = inspect.signature(function)
    returned = _Plain(signature.return_annotation)
    parameters = [
        parameter.replace(annotation=_Plain(parameter.annotation))
        for parameter in list(signature.parameters.values())[is_method:]
    ]
    line = f"{name}{signature.replace(parameters=parameters, return_annotation=returned)}"
    if len(line) <= _MAX_LINE:
        return line
    listed: list[str] = []
    has_star = False
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not has_star:
            listed.append("*")
        has_star |= parameter.kind in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.KEYWORD_ONLY,
        )
        listed.append(str(parameter))
    return "\n".join([f"{name}(", *(f"    {item}," for item in listed), f") -> {returned}"])


def _markdown(text: str) -> str:
    """Turn a docstring into Markdown: sections become lists."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
    lines: list[str] = []
    in_section = False
    for line in text.splitlines():
        heading = line.removesuffix(":")
        if heading in _SECTIONS and line.endswith(":"):
            in_section = True
            lines += [f"**{heading}**", ""]
        elif in_section and re.match(r"    \S", line):
            lines.append(_item(line.strip()))
        elif in_section and line.startswith("     "):
            lines.append(f"  {line.strip()}")
        else:
            in_section = in_section and not line
            lines.append(line)
    return "\n".join(lines).rstrip() + "\n"


def _item(text: str) -> str:
    """Make the first line of an argument or error a list item, its names set as code."""
    match = re.match(r"((?:\w+)(?:, \w+)*): (.*)", text)
    if match is None:
        return f"- {text}"
    names = ", ".join(f"`{name}`" for name in match[1].split(", "))
    return f"- {names}: {match[2]}"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(f"wrote {PAGE}")
