"""What the kernels of `standard_attention` say about themselves: see `cuattn.ops.registry`."""

from __future__ import annotations

from cuattn.ops.attention.forward.config import PlainFwdConfig
from cuattn.ops.registry import KernelGroup, Variant

__all__ = ["GROUPS"]


def _variants() -> list[Variant]:
    elements = dict.fromkeys(("Probability", "Element"), "__half")
    constants = {**PlainFwdConfig().constants("float16", 0, 0), **elements, "TILE": 16}
    return [Variant("attention_standard", "default", constants)]


GROUPS = (
    KernelGroup(
        "standard_attention",
        kernels=("attention_standard",),
        variants=_variants,
        tests=("operations/attention/test_standard_attention.py",),
        page="attention_forward.md",
    ),
)
