"""What the kernel that merges states says about itself: see `cuattn.ops.registry`."""

from __future__ import annotations

from cuattn.ops.merge import launch
from cuattn.ops.registry import ODD_STRIDES, KernelGroup, named

__all__ = ["GROUPS"]

GROUPS = (
    KernelGroup(
        "merge_states",
        kernels=("merge_states",),
        variants=lambda: named("merge_states", launch.variants()),
        tests=("operations/merge", ODD_STRIDES),
        page="merge_states.md",
    ),
)
