"""Before anything moves, ranks tell each other what they were called with.

One short message of each rank to all others: the name of the call, what has to be the same everywhere, and what may
differ from rank to rank. A rank whose own arguments are refused says so, and all raise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from cuattn.distributed.group import Group, describe
from cuattn.errors import MismatchError, PeerError

__all__ = ["agree", "agree_checked", "digest", "refuse"]

Result = TypeVar("Result")


def digest(x: Any) -> Any:
    """Return what two values are compared by: of an array on the host its content, on a GPU its shape and dtype."""
    if isinstance(x, np.ndarray):
        content = hashlib.sha256(np.ascontiguousarray(x).view(np.uint8).tobytes()).hexdigest()[:16] if x.size else ""
        return [list(x.shape), str(x.dtype), content]
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return [list(x.shape), str(x.dtype)]
    if isinstance(x, list | tuple):
        return [digest(item) for item in x]
    return x if isinstance(x, bool | int | str | type(None)) else repr(x)


def agree(group: Group, call: str, common: Mapping[str, Any], own: Any = None) -> list[Any]:
    """Return ``own`` of every rank; raises `MismatchError` unless all call the same with the same ``common``.

    Where the group is not ``checked``, nothing is sent, and everybody is taken for a rank like this one.
    """
    if not group.checked:
        return [own] * group.size
    words = {"call": call, **{name: digest(value) for name, value in common.items()}}
    said = [json.loads(word) for word in group.gather_control(json.dumps({"common": words, "own": own}).encode())]
    _raise_others_errors(said)
    for rank, other in enumerate(said):
        if other["common"] == json.loads(json.dumps(words)):
            continue
        theirs = other["common"]
        name = next((n for n in [*words, *theirs] if theirs.get(n) != json.loads(json.dumps(words.get(n)))), "call")
        raise MismatchError(
            f"{call}: ranks differ in {name}: {_of(words, name)} on rank {group.rank} and {_of(theirs, name)} on rank "
            f"{rank}"
        )
    return [other["own"] for other in said]


def agree_checked(
    group: Group, call: str, check: Callable[[], Result], described: Callable[[Result], tuple[Mapping[str, Any], Any]]
) -> tuple[Result, list[Any]]:
    """Make the checks of this rank, then agree; where the arguments of one rank are refused, all raise."""
    try:
        result = check()
        common, own = described(result)
    except Exception as error:
        refuse(group, error)
        raise
    return result, agree(group, call, common, own)


def refuse(group: Group, error: Exception) -> None:
    """Say, in place of an agreement, that this rank raises; all others do too."""
    if group.checked and group.size > 1:
        group.gather_control(json.dumps({"error": describe(error)}).encode())


def _raise_others_errors(said: list[Any]) -> None:
    for rank, other in enumerate(said):
        if "error" in other:
            raise PeerError(f"rank {rank} refused its arguments: {other['error']}", rank=rank)


def _of(words: Mapping[str, Any], name: str) -> str:
    return json.dumps(words.get(name))[:120]
