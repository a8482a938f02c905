"""Every operation that the fuzzer draws, by name.

>>> sorted(OPERATIONS)[:2]
['append_kv', 'attention']
"""

from __future__ import annotations

from collections.abc import Sequence

from cuattn.errors import ArgumentError
from cuattn.testing.fuzzing import of_attention, of_caches, of_linear, of_rows, of_variants
from cuattn.testing.fuzzing.operation import Operation

__all__ = ["OPERATIONS", "choose"]

_MODULES = (of_attention, of_caches, of_linear, of_variants, of_rows)
OPERATIONS: dict[str, Operation] = {one.name: one for module in _MODULES for one in module.OPERATIONS}


def choose(names: Sequence[str]) -> list[Operation]:
    """Return the operations of those names, or all. Raises `ArgumentError` for a name that is none."""
    unknown = [name for name in names if name not in OPERATIONS]
    if unknown:
        raise ArgumentError(f"no operation {unknown[0]!r}; known are {', '.join(OPERATIONS)}")
    return [OPERATIONS[name] for name in dict.fromkeys(names)] if names else list(OPERATIONS.values())
