"""A valid call, whose arguments can be replaced."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

__all__ = ["Call", "parameters"]


class Call(NamedTuple):
    """A function, arguments that it takes, and values that others of its arguments may have."""

    function: Callable[..., Any]
    given: dict[str, Any]
    options: Mapping[str, Any] = MappingProxyType({})


def parameters(call: Call) -> list[str]:
    """The names of all arguments."""
    signature = inspect.signature(call.function).parameters.values()
    named = [p.name for p in signature if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return list(dict.fromkeys([*named, *call.given, *call.options]))
