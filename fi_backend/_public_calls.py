"""Wrap every public call, from the one table that names them.

Only where the environment asks for a log or for traces is anything wrapped.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from types import FunctionType, ModuleType
from typing import Any

import torch

__all__ = ["bound_arguments", "call_name", "unless_compiled", "wrap_public_calls"]

Function = Callable[..., Any]


def wrap_public_calls(module_of: Mapping[str, str], wrap: Callable[[Function], Function]) -> None:
    """Put `wrap(function)` in the place of every public function and method.

    Of a class these are the constructor and the public methods, inherited ones included. Classes
    that only hold data compute nothing: they are left alone.

    Args:
        module_of: the module below fi_backend of every public name.
        wrap: returns the replacement; called once a function, so that aliases stay aliases.
    """
    made: dict[Function, Function] = {}

    def once(function: Function) -> Function:
        if function in made.values():  # of a base class that another class has too
            return function
        if function not in made:
            made[function] = wrap(function)
        return made[function]

    # All before the first is wrapped: what modules call while they are imported is not a caller's.
    modules = {name: importlib.import_module(f"fi_backend.{m}") for name, m in module_of.items()}
    for name, module in modules.items():
        value = getattr(module, name)
        if isinstance(value, type):
            _wrap_methods(value, once)
        else:
            _set(module, name, value, once)


def _wrap_methods(cls: type, wrap: Callable[[Function], Function]) -> None:
    for owner in cls.__mro__:
        if is_dataclass(owner) or not owner.__module__.startswith("fi_backend."):
            continue
        for name, value in list(vars(owner).items()):
            is_public = name == "__init__" or not name.startswith("_")
            if is_public and not getattr(value, "__isabstractmethod__", False):
                _set(owner, name, value, wrap)


def _set(
    owner: ModuleType | type, name: str, value: object, wrap: Callable[[Function], Function]
) -> None:
    if isinstance(value, functools.partial):
        whole = functools.partial(wrap(value.func), *value.args, **value.keywords)
        setattr(owner, name, whole)
    elif isinstance(value, FunctionType):
        setattr(owner, name, wrap(value))


def unless_compiled(function: Function, observed: Function) -> Function:
    """Return a function that is `observed`, and `function` where torch.compile traces it."""

    # A closure of functions alone: torch.compile cannot rebuild other objects of a constructor's.
    @functools.wraps(function)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        return observed(*args, **kwargs)

    return chosen


def call_name(function: Function, args: tuple[Any, ...]) -> str:
    """Name a call as its caller sees it: a method by the class of its object."""
    if "." in function.__qualname__ and args:
        return f"{type(args[0]).__name__}.{function.__name__}"
    return function.__name__


def bound_arguments(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return arguments by name, `self` left out; by position where they do not fit."""
    try:
        named = dict(signature.bind(*args, **kwargs).arguments)
    except TypeError:  # the call itself says what is wrong
        return {str(at): value for at, value in enumerate(args)} | kwargs
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    named.pop("self", None)
    return named
