"""What the kernels of rotary position embedding say about themselves: see `cuattn.ops.registry`."""

from __future__ import annotations

from cuattn.ops.registry import ODD_STRIDES, KernelGroup, Variant
from cuattn.ops.rotary.arguments import kernel_constants

__all__ = ["GROUPS"]

GROUPS = (
    KernelGroup(
        "rope",
        kernels=("rope",),
        variants=lambda: [Variant("rope", "default", kernel_constants("float16", False, None))],
        tests=("operations/rotary", ODD_STRIDES),
        page="rope.md",
    ),
    KernelGroup(
        "split_qkv",
        kernels=("split_qkv",),
        variants=lambda: [
            Variant("split_qkv", "default", {**kernel_constants("float16", False, None), "ROTATE": True})
        ],
        tests=("operations/rotary", ODD_STRIDES),
        page="rope.md",
    ),
)
