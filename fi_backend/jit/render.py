"""KernelSpec -> C++ text, through jinja2 with nothing left to chance.

A missing parameter raises, an unused one raises, and a bool or a float printed without the ``cpp``
filter raises: Python's ``True`` and ``inf`` are not C++.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fi_backend.jit import paths
from fi_backend.jit.kernel_spec import KernelSpec

if TYPE_CHECKING:
    import jinja2

_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t", "?": "\\?"}
_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1


def cpp_literal(value: object) -> str:
    """Return a C++17 literal of the same value: bool, int, double or string.

    Raises:
        TypeError: the type has no C++ literal.
        ValueError: an integer fits neither ``int64_t`` nor ``uint64_t``.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return _integer(value)
    if isinstance(value, float):
        return _double(value)
    if isinstance(value, str):
        return '"' + "".join(map(_character, value)) + '"'
    raise TypeError(f"no C++ literal for {type(value).__name__}: {value!r}")


def _integer(value: int) -> str:
    if not -_INT64_MAX - 1 <= value <= 2 * _INT64_MAX + 1:
        raise ValueError(f"integer does not fit 64 bits: {value}")
    if value > _INT64_MAX:
        return f"{value}ULL"
    if value == -_INT64_MAX - 1:  # no literal of its own: minus applies to an unsigned one
        return f"(-{_INT64_MAX}LL - 1)"
    suffix = "" if -_INT32_MAX <= value <= _INT32_MAX else "LL"
    return f"({value}{suffix})" if value < 0 else f"{value}{suffix}"


def _double(value: float) -> str:
    if math.isnan(value):
        return '__builtin_nan("")'
    if math.isinf(value):
        return "__builtin_inf()" if value > 0 else "(-__builtin_inf())"
    text = repr(value)  # the shortest text that reads back to the same double
    text = text if any(c in text for c in ".e") else text + ".0"
    return f"({text})" if math.copysign(1.0, value) < 0 else text


def _character(char: str) -> str:
    if char in _ESCAPES:
        return _ESCAPES[char]
    if char.isascii() and char.isprintable():
        return char
    return "".join(f"\\{byte:03o}" for byte in char.encode())


def _finalize(value: Any) -> Any:
    if isinstance(value, (bool, float)) or value is None:
        raise TypeError(f"template prints the Python value {value!r}; write {{{{ x | cpp }}}}")
    return value


def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        autoescape=False,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def cpp(value: object) -> str:
        if isinstance(value, jinja2.Undefined):
            str(value)  # raises the error that names the parameter
        return cpp_literal(value)

    environment.filters["cpp"] = cpp
    return environment


def render_text(template: str, parameters: dict[str, Any]) -> str:
    """Render one template text.

    Raises:
        jinja2.UndefinedError: the template uses a name that is not in ``parameters``.
        TypeError: a value is printed raw that is not the same text in C++.
    """
    return _environment().from_string(template).render(parameters)


def render(spec: KernelSpec) -> dict[str, str]:
    """Return ``{file name: source text}``, one translation unit per template.

    Raises:
        ValueError: no template uses one of the parameters.
        jinja2.UndefinedError, TypeError: see :func:`render_text`.
    """
    from jinja2 import meta

    environment = _environment()
    parameters = dict(spec.parameters)
    unused = set(parameters)
    units = {}
    for template in spec.templates:
        text = paths.template_path(spec, template).read_text(encoding="utf-8")
        unused -= meta.find_undeclared_variables(environment.parse(text))
        unit = template.rpartition("/")[2].removesuffix(".j2")
        units[unit] = environment.from_string(text).render(parameters)
    if unused:
        raise ValueError(
            f"{spec.name}: no template of {spec.templates} uses parameter {sorted(unused)}; "
            "an unused parameter compiles the same module twice, remove it"
        )
    return units
