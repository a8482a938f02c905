"""What the kernels of linear attention say about themselves: see `cuattn.ops.registry`."""

from __future__ import annotations

from collections.abc import Iterator

from cuattn.ops.linear import config
from cuattn.ops.registry import KernelGroup, Variant

__all__ = ["GROUPS"]

_DECAYS = ("plain", "decay", "channels")


def _variants() -> Iterator[Variant]:
    for row in config.fma_rows():
        name = f"{row.dtype_name}_d{row.head_dim}_{_DECAYS[row.decay]}{'_normalized' if row.normalize else ''}"
        yield Variant(row.source, name, row.constants(), num_threads=row.num_threads, smem_bytes=row.smem_bytes)


GROUPS = (
    KernelGroup(
        "linear_attention",
        kernels=("linear_attention_fma",),
        variants=_variants,
        tests=("operations/linear",),
        page="linear_attention.md",
    ),
)
