"""Signatures and docstrings of functions that take the options of `cuattn.attention` as ``**options``.

`help()` and editors see every keyword with its default: names, defaults and their order are those of the table, types
those of the TypedDict, and what an option means is what the docstring of `cuattn.attention` says.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from cuattn.ops.attention.dense import attention
from cuattn.ops.attention.operation import Operation
from cuattn.ops.attention.options import KEYWORDS

__all__ = ["takes_options"]

Function = TypeVar("Function", bound=Callable[..., Any])

#: The parameter of a docstring that stands for the options that it does not describe itself.
_PLACE = re.compile(r"^\*\*options\n(?: {4}.*\n)+", re.MULTILINE)
_ENTRY = re.compile(r"^(?P<names>\w+(?:, \w+)*)(?: : .*)?\n(?: {4}.*\n)*", re.MULTILINE)


def takes_options(operation: Operation, *, before: str) -> Callable[[Function], Function]:
    """Decorator: give a function the signature and the docstring that it has with the options of its operation.

    The options stand before the keyword ``before``. In the docstring they take the place of ``**options`` and of what
    is said about it; those that the docstring describes itself are left to it.
    """

    def decorate(function: Function) -> Function:
        described: Any = function
        described.__signature__ = _signature(function, operation, before)
        if function.__doc__ is not None:  # python -OO
            function.__doc__ = _completed(inspect.cleandoc(function.__doc__), operation)
        return function

    return decorate


def _signature(function: Callable[..., Any], operation: Operation, before: str) -> inspect.Signature:
    own = inspect.signature(function)
    types = {
        name: annotation.__forward_arg__ for name, annotation in KEYWORDS[operation.family].__annotations__.items()
    }
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=types[name])
        for name, default in operation.defaults.items()
    ]
    parameters = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    place = [p.name for p in parameters].index(before)
    return own.replace(parameters=[*parameters[:place], *options, *parameters[place:]])


def _completed(docstring: str, operation: Operation) -> str:
    missing = operation.defaults.keys() - entries(docstring).keys()
    of_attention = entries(inspect.getdoc(attention) or "")
    texts = dict.fromkeys(text for name, text in of_attention.items() if name in missing)  # once what several share
    return _PLACE.sub(lambda found: "".join(texts), docstring)


@cache
def entries(docstring: str) -> dict[str, str]:
    """Read what a docstring says about each parameter: the lines of its entry."""
    section = docstring.partition("Parameters\n----------\n")[2].partition("\n\n")[0] + "\n"
    return {name: found[0] for found in _ENTRY.finditer(section) for name in found["names"].split(", ")}
