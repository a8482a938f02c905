"""What the softmax kernels say about themselves: see `cuattn.ops.registry`."""

from __future__ import annotations

from collections.abc import Iterator

from cuattn.ops.registry import KernelGroup, Variant, named
from cuattn.ops.softmax import config

__all__ = ["GROUPS"]


def _variants() -> Iterator[Variant]:
    for kernel, constants in config.variants():
        yield from named(kernel, [constants])


GROUPS = (
    KernelGroup(
        "softmax",
        kernels=("softmax", "softmax_onchip", "softmax_split", "online_softmax_state"),
        variants=_variants,
        tests=("operations/softmax",),
        page="softmax.md",
    ),
)
