"""Which class each handler counts under in `cuattn.host.profile`."""

from __future__ import annotations

#: Handlers outside arithmetic.
CORE_CLASSES = {
    "bra": "control", "brx": "control", "exit": "control", "trap": "control", "nop": "control",
    "bar": "barrier", "fence": "barrier", "warp_sync": "barrier",
    "ld": "memory", "st": "memory", "ld_param": "memory", "param_address": "memory", "isspacep": "memory", "atom": "atomic",
    "cp_async": "async", "cp_async_commit": "async", "cp_async_wait": "async",
    "shfl": "collective", "vote": "collective", "match": "collective", "redux": "collective", "activemask": "collective",
    "elect": "collective", "ldmatrix": "matrix", "stmatrix": "matrix",
}  # fmt: skip


def class_of(op: str) -> str:
    """The class of a handler's name."""
    if op in CORE_CLASSES:
        return CORE_CLASSES[op]
    return "mma" if op.startswith("mma_") else "arithmetic"
