"""Write the definition of each public call when its form is first seen."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fi_backend._public_calls import bound_arguments, unless_compiled, wrap_public_calls
from fi_backend.trace.definitions import template_of, write
from fi_backend.trace.template import TraceTemplate

__all__ = ["CallTrace", "install"]

# What a wrapper's run() computes also depends on what these were given.
_REMEMBERED = ("__init__", "plan")


def install(module_of: Mapping[str, str], directory: Path) -> None:
    """Trace every public call into a directory.

    Args:
        module_of: the module below fi_backend of every public name.
        directory: made when the first definition is written.
    """
    wrap_public_calls(module_of, CallTrace(directory).wrap)


class CallTrace:
    """Writes the definition of each successful call once for its constant axes and dtypes.

    Only shapes and dtypes are looked at. Calls that torch.compile traces are left out, and so are
    those that ask for more than their template's reference computes.

    Args:
        directory: where definitions go.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._written: set[str] = set()
        self._given: weakref.WeakKeyDictionary[object, dict[str, Any]] = weakref.WeakKeyDictionary()

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, whose definition is written after the first call of each form."""
        signature = inspect.signature(function)
        is_method = "." in function.__qualname__

        def traced(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)  # first: it refuses what no template describes
            arguments = bound_arguments(signature, args, kwargs)
            if is_method:
                self._method(args[0], function.__name__, arguments)
            else:
                self._define(template_of(function.__name__), arguments)
            return result

        return unless_compiled(function, traced)

    def _method(self, owner: object, name: str, arguments: dict[str, Any]) -> None:
        if name in _REMEMBERED:
            given = {} if name == "__init__" else self._given.get(owner, {})
            self._given[owner] = {**given, **arguments}
            return
        names = (f"{cls.__name__}.{name}" for cls in type(owner).__mro__)
        template = next(filter(None, map(template_of, names)), None)
        self._define(template, {**self._given.get(owner, {}), **arguments})

    def _define(self, template: TraceTemplate | None, arguments: dict[str, Any]) -> None:
        form = template.form_of(arguments) if template is not None else None
        if template is None or form is None or (name := template.name(*form)) in self._written:
            return
        self._written.add(name)
        try:
            write(template.definition(*form), self._directory)
        except OSError as error:  # no reason to stop a server
            warnings.warn(f"fi_backend: {name} is not traced: {error}", stacklevel=4)
