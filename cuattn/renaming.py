"""Errors of one function in the words of another that calls it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from cuattn.errors import CuattnError

__all__ = ["renamed"]


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Where an error leaves the block, call the arguments ``names`` in its message what the caller knows them by.

    >>> from cuattn.errors import ShapeError
    >>> with renamed({"q": "query"}):
    ...     raise ShapeError("q has shape (3,), and k another")
    Traceback (most recent call last):
        ...
    cuattn.errors.ShapeError: query has shape (3,), and k another
    """
    try:
        yield
    except CuattnError as error:
        if error.args and isinstance(error.args[0], str):
            pattern = rf"(?<![\w'])({'|'.join(map(re.escape, names))})(?![\w'])"
            message = re.sub(pattern, lambda match: names[match[1]], error.args[0])
            error.args = (message, *error.args[1:])
        raise
