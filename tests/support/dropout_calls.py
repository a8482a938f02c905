"""Arguments of dropout, and which elements a call keeps."""

from __future__ import annotations

import numpy as np

NAMES = ("dropout_p", "dropout_seed", "dropout_offset")
#: p, seed and offset: usual, nearly nothing kept, nearly everything kept; every word of key and counter in use.
ARGUMENTS = (
    (0.1, 0, 0),
    (0.9, 1, 2**32 - 1),
    (0.5, 2**64 - 1, 7),
    (0.3, 2**32, 0),
    (1e-3, 12345678901234567890, 2**31),
    (0.999, 5, 5),
)


def probabilities(call_on, seqlens, dtype, *, heads=2, batch=2, head_dim=32, **options):
    """P Z [B, H, N, M] as a kernel computes it, read through values that are columns of the identity."""
    rng = np.random.default_rng(3)
    seqlen_q, seqlen_k = seqlens
    q = rng.standard_normal((batch, seqlen_q, heads, head_dim)).astype(dtype)
    k = rng.standard_normal((batch, seqlen_k, 1, head_dim)).astype(dtype)
    columns = []
    for start in range(0, seqlen_k, 32):
        v = np.zeros((batch, seqlen_k, 1, 32), dtype)
        for j in range(start, min(start + 32, seqlen_k)):
            v[:, j, :, j - start] = 1
        columns.append(call_on(q, k, v, **options)[0].astype(np.float64))
    return np.concatenate(columns, axis=-1)[..., :seqlen_k].swapaxes(1, 2), q, k
