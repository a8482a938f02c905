"""Calls of the Hopper forward kernel with NumPy arrays, on any executor that has it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from attention_calls import prepare

from cuattn.ops.attention.forward.hopper_config import HOPPER_ALTERNATIVES, HOPPER_FWD_CONFIGS
from cuattn.testing import assert_attention_close, assert_varlen_close, kernels
from cuattn.testing.arrays import Guarded, place
from cuattn.testing.options import make_sinks, make_slopes
from cuattn.testing.strategies import fill

F16, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)

#: Rows of 16 bits; those of 8 have tests of their own.
ROWS = [row for row in HOPPER_FWD_CONFIGS if row.itemsize == 2]
ALL_ROWS = [*ROWS, *(row for row in HOPPER_ALTERNATIVES if row.itemsize == 2)]
#: One consumer, whose tiles of 64 by 128 are soon full: the row of most tests. And one with three that take turns.
SMALL = ROWS[0]
TURNS = ROWS[3]


def make(seqlens, dtype=F16, *, heads=(1, 1), head_dims=(64, 64), batch=1, seed=0, layout=None, kind="normal"):
    """q, k and v in a layout, among poison."""
    rng = np.random.default_rng(seed)
    shapes = (
        (batch, seqlens[0], heads[0], head_dims[0]),
        (batch, seqlens[1], heads[1], head_dims[0]),
        (batch, seqlens[1], heads[1], head_dims[1]),
    )
    return [place(fill(shape, dtype, kind, rng), layout).array for shape in shapes]


def call(executor, *arrays, config=SMALL, **options):
    """(out, lse) of a call as NumPy arrays, from NumPy arrays in any layout."""
    arrays, options = prepare(executor, arrays, options)
    out, lse = kernels.attention(*arrays, config=config, return_lse=True, **options)
    return executor.numpy(out), executor.numpy(lse)


def assert_right(executor, *arrays, config=SMALL, **options):
    out, lse = call(executor, *arrays, config=config, **options)
    arrays = [x.array if isinstance(x, Guarded) else x for x in arrays]
    assert_attention_close(out, *arrays, lse=lse, **options)
    return out, lse


def call_varlen(executor, *arrays, config=SMALL, **options):
    arrays, options = prepare(executor, arrays, options)
    out, lse = kernels.attention_varlen(*arrays, config=config, return_lse=True, **options)
    return executor.numpy(out), executor.numpy(lse)


def assert_varlen_right(executor, arrays, starts, config=SMALL, **options):
    on_device = options.pop("schedule_on_device", False)
    moved, on_executor = prepare(executor, arrays, options)
    results = kernels.attention_varlen(
        *moved, *starts, config=config, return_lse=True, schedule_on_device=on_device, **on_executor
    )
    out, lse = (executor.numpy(x) for x in results)
    assert_varlen_close(out, *arrays, *starts, lse=lse, **options)
    return out, lse


def same_bits(one, other):
    return all(x.tobytes() == y.tobytes() for x, y in zip(one, other, strict=True))


def name_of(row):
    return f"{row.block_m}x{row.block_n}-d{row.max_head_dim}-e{row.max_head_dim_v}{'-turns' * row.ping_pong}"


def everything(rng, batch, heads, seqlen_q, seqlen_k):
    return {
        "scale": -0.6,
        "causal": True,
        "window": (60, None),
        "diagonal_offset": np.int32([2, seqlen_k - 1])[:batch],
        "softcap": 3.0,
        "alibi_slopes": make_slopes(rng, (batch, heads)),
        "sinks": make_sinks(rng, heads),
    }
