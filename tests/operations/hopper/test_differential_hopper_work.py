"""How much the Hopper kernel of differential attention does, counted by the host executor, beside two calls."""

from __future__ import annotations

import pytest
from differential_calls import F16, make

from cuattn import host
from cuattn.ops.attention.forward.hopper_select import select_row
from cuattn.ops.attention.shipped import CAUSAL
from cuattn.ops.differential.hopper_config import HOPPER_DIFFERENTIAL_CONFIGS as ROWS
from cuattn.testing import kernels

N, D, E, ITEMSIZE = 1024, 64, 128, 2
ROW = ROWS[0]


def bytes_read(row, key_columns):
    """Of a causal call: queries of both streams, and each key tile that a query tile sees, whole."""
    tiles = sum(-(-(first + row.block_m) // row.block_n) for first in range(0, N, row.block_m))
    return ITEMSIZE * (N * 2 * D + tiles * row.block_n * (key_columns + E))


@pytest.mark.parametrize("shared", (False, True), ids=("v1", "v2"))
def test_work(shared):
    """One launch; each tile of v, and of keys that are shared, is copied once for both streams; no instruction more
    than two calls of the Hopper kernel of attention issue, 5 % fewer at least."""
    q, k, v = make((1, N, N, 1, 1, D, E), F16, shared=shared)
    with host.profile() as one:
        kernels.differential_attention(q, k, v, 0.5, config=ROW, causal=True)
    with host.profile() as two:
        row = select_row(D, E, N, CAUSAL, 227 * 1024)
        for stream in range(2):
            keys = k if shared else k[:, :, stream::2]
            kernels.attention(q[:, :, stream::2], keys, v, config=row, causal=True)
    assert (one.launches, two.launches) == (1, 2)
    assert one.bytes["global"]["read"] == bytes_read(ROW, D if shared else 2 * D)
    # Beside two calls with tiles of this shape, which read keys and values for each stream apart.
    apart = 2 * bytes_read(ROW, D) - ITEMSIZE * N * 2 * D
    assert one.bytes["global"]["read"] <= (0.55 if shared else 0.70) * apart
    assert one.bytes["global"]["write"] == two.bytes["global"]["write"] / 2
    assert one.warp_instructions <= 0.95 * two.warp_instructions
