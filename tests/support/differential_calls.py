"""Problems of differential attention for tests: arrays by their extents."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from cuattn.ops.differential.launch import DifferentialState
from cuattn.testing import kernels
from cuattn.testing.differential_tolerance import assert_differential_close

F16, BF16, F32, F64 = map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))
DTYPES = (F16, BF16, F32, F64)


def make(shape: tuple[int, ...], dtype: Any, *, shared: bool = False, seed: int = 0) -> list[Any]:
    """q [B, N, 2H, D], k [B, M, 2G or G, D], v [B, M, G, E] for shape (B, N, M, H, G, D, E)."""
    batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim, head_dim_v = shape
    rng = np.random.default_rng(seed)
    key_heads = kv_heads if shared else 2 * kv_heads
    shapes = (
        (batch, seqlen_q, 2 * heads, head_dim),
        (batch, seqlen_k, key_heads, head_dim),
        (batch, seqlen_k, kv_heads, head_dim_v),
    )
    return [rng.standard_normal(s).astype(dtype) for s in shapes]


def call(
    executor: Any, q: Any, k: Any, v: Any, lambda_: Any, *, config: Any = None, **options: Any
) -> tuple[Any, DifferentialState[Any]]:
    """out and state as NumPy arrays, from NumPy arrays in any layout; ``config``: a row of one's own choice."""

    def there(x: Any) -> Any:
        return executor.array(x) if isinstance(x, np.ndarray) else x

    given = {name: there(x) for name, x in options.items()}
    arrays = map(there, (q, k, v, lambda_))
    out, state = kernels.differential_attention(*arrays, config=config, return_state=True, **given)
    return executor.numpy(out), DifferentialState(*map(executor.numpy, state))


def assert_right(executor: Any, q: Any, k: Any, v: Any, lambda_: Any, *, config: Any = None, **options: Any) -> Any:
    """The call agrees with the reference; returns what it gave."""
    out, state = call(executor, q, k, v, lambda_, config=config, **options)
    assert_differential_close(out, q, k, v, lambda_, state=state, **options)
    return out, state
