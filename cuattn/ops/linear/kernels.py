"""What the kernels of linear attention say about themselves: see `cuattn.ops.registry`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from cuattn.ops.linear import backward_config, config, segments
from cuattn.ops.registry import TYPICAL_DTYPE, KernelGroup, Variant

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


def _backward_variants() -> Iterator[Variant]:
    for itemsize, channels, aligned in itertools.product((2, 4, 8), (False, True), (True, False)):
        dtype_name = TYPICAL_DTYPE[itemsize]
        words = [dtype_name, "channels" if channels else "heads", "elementwise"]
        yield Variant(
            "linear_attention_backward",
            "_".join(words[: 3 - aligned]),
            backward_config.constants(dtype_name, itemsize, channels=channels, aligned=aligned),
            num_threads=backward_config.shape_of(itemsize).num_threads,
            smem_bytes=max(backward_config.smem_bytes(itemsize, channels=channels).values()),
        )


GROUPS = (
    KernelGroup(
        "linear_attention",
        kernels=("linear_attention", "linear_attention_fma", "linear_attention_scan"),
        variants=_variants,
        tests=("operations/linear/test_linear_attention*.py",),
        page="linear_attention.md",
    ),
    KernelGroup(
        "linear_attention_backward",
        kernels=("linear_attention_backward",),
        variants=_backward_variants,
        tests=("operations/linear/test_linear_backward*.py",),
        page="linear_attention_backward.md",
    ),
)
