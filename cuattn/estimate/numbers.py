"""Whole numbers and names as callers give them. `cuattn.scalars` does the same for arrays, and so imports NumPy."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, TypeVar

from cuattn.errors import ArgumentError

__all__ = ["count", "named"]

T = TypeVar("T")


def count(name: str, value: Any, least: int = 0) -> int:
    """Return `value` as an int of at least `least`; numbers of NumPy are taken, floats and flags are not."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ArgumentError(f"{name} is {value!r}; a whole number is needed") from None
    if number < least:
        raise ArgumentError(f"{name} is {number}; {least} or more is needed")
    return number


def named(name: str, value: Any, table: Mapping[str, T]) -> T:
    """Return the row of `table` that `value` names, in capitals or not."""
    wanted = str(value).casefold()
    for key, row in table.items():
        if key.casefold() == wanted:
            return row
    raise ArgumentError(f"{name} is {value!r}; known are {', '.join(table)}")
