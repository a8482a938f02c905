"""What the kernels that write caches say about themselves: see `cuattn.ops.registry`."""

from __future__ import annotations

from cuattn.kv import append, copy
from cuattn.ops.registry import ODD_STRIDES, KernelGroup, Variant, named

__all__ = ["GROUPS"]

_ON_DEVICE = "kv/test_paging_on_device.py"

GROUPS = (
    KernelGroup(
        "append_kv",
        kernels=("append_kv",),
        variants=lambda: named("append_kv", append.variants()),
        tests=("kv/test_append*.py", "kv/test_kv_codes.py", _ON_DEVICE, ODD_STRIDES),
        page="append_kv.md",
    ),
    KernelGroup(
        "copy_pages",
        kernels=("copy_pages",),
        variants=lambda: [Variant("copy_pages", "default", copy.constants(16))],
        tests=("kv/test_copy_pages.py", _ON_DEVICE, ODD_STRIDES),
        page="append_kv.md",
    ),
    KernelGroup(
        "slot_mapping",
        kernels=("slot_mapping",),
        variants=lambda: [Variant("slot_mapping", "default", {"NUM_THREADS": 128})],
        tests=("kv/test_slot_mapping.py", _ON_DEVICE, ODD_STRIDES),
        page="append_kv.md",
    ),
)
