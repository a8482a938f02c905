"""Values in the messages of errors. Nothing but the standard library, so that the compile path can use it alone."""

from __future__ import annotations

from typing import Any

__all__ = ["shown"]

_LONGEST = 120  # characters of a value in a message
_FEW = 8  # elements of an array that are all shown


def shown(value: Any) -> str:
    """``value`` for a message: its repr as far as it has one, and not all of a long one.

    >>> shown("a" * 200)[-8:]
    'aaaaa...'
    """
    try:
        if type(value).__name__ == "ndarray" and value.size > _FEW:
            return f"an array {list(value.shape)} of {value.dtype}"
        text = " ".join(repr(value).split())  # one line
    except Exception:  # whatever a foreign __repr__ raises; ints of more than 4300 digits have none either
        text = f"an object of type {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
