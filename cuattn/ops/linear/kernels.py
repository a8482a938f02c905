"""What the kernels of linear attention say about themselves: see `cuattn.ops.registry`."""

from __future__ import annotations

from collections.abc import Iterator

from cuattn.ops.linear import config, segments
from cuattn.ops.registry import KernelGroup, Variant

__all__ = ["GROUPS"]

_DECAYS = ("plain", "decay", "channels")


def _variants() -> Iterator[Variant]:
    rows: list[config.Row] = [*config.fma_rows(), *config.mma_rows()]
    for row in rows:
        words = [row.dtype_name, f"d{row.head_dim}", _DECAYS[row.decay]]
        if isinstance(row, config.MmaRow):
            words += [f"e{row.slice_cols}", f"{row.num_stages}stages"]
            words += [] if row.aligned else ["elementwise"]
        words += ["normalized"] if row.normalize else []
        name = "_".join(words)
        yield Variant(row.source, name, row.constants(), num_threads=row.num_threads, smem_bytes=row.smem_bytes)
    yield Variant(segments.SCAN_SOURCE, "default", segments.scan_constants(), num_threads=segments.SCAN_THREADS)


GROUPS = (
    KernelGroup(
        "linear_attention",
        kernels=("linear_attention", "linear_attention_fma", "linear_attention_scan"),
        variants=_variants,
        tests=("operations/linear",),
        page="linear_attention.md",
    ),
)
