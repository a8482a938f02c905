"""What the kernels of padded batches say about themselves: see `cuattn.ops.registry`."""

from __future__ import annotations

from cuattn.ops.registry import KernelGroup, Variant

__all__ = ["GROUPS"]

GROUPS = (
    KernelGroup(
        "padding",
        kernels=("padding_plan", "padding_rows"),
        variants=lambda: [
            Variant(kernel, "default", {"NUM_THREADS": 256}) for kernel in ("padding_plan", "padding_rows")
        ],
        tests=("operations/padding", "operations/rotary/test_split_qkv.py"),
        page="padding.md",
    ),
)
