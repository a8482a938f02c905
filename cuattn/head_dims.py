"""Which head dims there are: the one place that says it, for checks, kernel tables and caches.

A kernel is compiled for a bucket of D, the head dim of q and k, and for so many columns of v and out. A row of out of
more than `MAX_COLUMNS` columns is more than the registers of a warp hold beside everything else: two CTAs then compute
a half of the columns each, and both of them the scores.

Examples
--------
>>> BUCKETS[40], BUCKETS[256], BUCKETS[257]
(64, 256, 512)
>>> COLUMNS[128], COLUMNS[300], COLUMNS[512]
((128, 1), (192, 2), (256, 2))
"""

from __future__ import annotations

__all__ = ["BUCKETS", "COLUMNS", "HEAD_DIM_BUCKETS", "MAX_COLUMNS", "MAX_GRADIENT_HEAD_DIM", "MAX_HEAD_DIM"]

#: Head dims that kernels are compiled for. A smaller one runs in the next larger bucket, padded on chip.
HEAD_DIM_BUCKETS = (32, 64, 96, 128, 192, 256, 512)
#: Of attention, of decoding, and of all that writes and turns rows.
MAX_HEAD_DIM = HEAD_DIM_BUCKETS[-1]
#: Of the gradients, whose sums of dq, dk and dv are rows of registers too.
MAX_GRADIENT_HEAD_DIM = 256
#: Columns of out that one CTA computes, at most.
MAX_COLUMNS = 256


def _bucket(size: int) -> int:
    return next(bucket for bucket in HEAD_DIM_BUCKETS if size <= bucket)


def _columns(head_dim_v: int) -> tuple[int, int]:
    num_blocks = max(1, -(-head_dim_v // MAX_COLUMNS))
    return _bucket(-(-head_dim_v // num_blocks)), num_blocks


#: The bucket of each D from 0 to `MAX_HEAD_DIM`.
BUCKETS = tuple(map(_bucket, range(MAX_HEAD_DIM + 1)))
#: Of each E from 0 to `MAX_HEAD_DIM`: the columns of v and out that a CTA is compiled for, and the CTAs of a row.
COLUMNS = tuple(map(_columns, range(MAX_HEAD_DIM + 1)))
