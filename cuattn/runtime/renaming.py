"""Errors of one function for the caller of another that calls it, and that has other names for the arguments."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from cuattn.errors import CuattnError

__all__ = ["renamed"]


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Add to an error that leaves the block what the caller calls the arguments that its message names.

    >>> from cuattn.errors import ShapeError
    >>> with renamed({"q": "query", "k": "key"}):
    ...     raise ShapeError("q has shape (3,)")
    Traceback (most recent call last):
        ...
    cuattn.errors.ShapeError: q has shape (3,) (q is query)
    """
    try:
        yield
    except CuattnError as error:
        message = error.args[0] if error.args else None
        if isinstance(message, str):
            told = [f"{n} is {known}" for n, known in names.items() if re.search(rf"(?<![\w']){n}(?![\w'])", message)]
            if told:
                error.args = (f"{message} ({', '.join(told)})", *error.args[1:])
        raise
