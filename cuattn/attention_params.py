"""The structs that attention kernels are passed by value: the Python twins of kernels/attention_params.cuh and
kernels/attention_backward_params.cuh.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["UNBOUNDED", "pack", "pack_backward"]

UNBOUNDED = 2**31 - 1  # a side of the window

# As the C compiler lays AttentionParams<Real> out: strides, 13 integers, the four words of dropout, then the reals; the
# trailing "0q" completes the struct to a multiple of its alignment.
_LAYOUT = "@27q13i4I4{real}0q"
_PACK = {np.float32: struct.Struct(_LAYOUT.format(real="f")), np.float64: struct.Struct(_LAYOUT.format(real="d"))}


def pack(
    accumulator: type[np.floating[Any]],
    *,
    strides: Sequence[int],
    integers: Sequence[int],
    dropout: Sequence[int],
    reals: Sequence[float],
) -> np.void:
    """The struct as a scalar that both executors pass by value.

    Parameters
    ----------
    accumulator : numpy.float32 or numpy.float64
        Real, the type of the accumulators.
    strides : 27 ints
        Of q, k, v, out (batch, seq, head), of bias, mask, tile_class (batch, head, query, key), of lse (batch, head),
        and of the ALiBi slopes (batch).
    integers : 13 ints
        From num_heads to use_dropout, in the order of the header.
    dropout : 4 ints
        Low and high word of the seed, offset, threshold.
    reals : 4 floats
        keep_scale, scale, scale_log2, softcap.
    """
    return np.void(_PACK[accumulator].pack(*strides, *integers, *dropout, *reals))


_GRADIENT_STRIDES = struct.Struct("@12q")


def pack_backward(forward: np.void, strides: Sequence[int]) -> np.void:
    """The struct of a backward kernel: that of the forward pass, and ``strides`` (12 ints) of dout, dq, dk and dv."""
    return np.void(forward.tobytes() + _GRADIENT_STRIDES.pack(*strides))
