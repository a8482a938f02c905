"""Random inputs of a case, made where they will be used."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn.testing.cases import AttentionCase, SoftmaxCase


def make(case: AttentionCase | SoftmaxCase, executor: str, seed: int) -> dict[str, Any]:
    """Standard normal arrays: NumPy's for ``"host"``, CuPy's for ``"cuda"``."""
    if executor == "host":
        return case.make_inputs(seed)
    import cupy

    shapes: dict[str, tuple[int, ...]] = (
        dict(case.shapes) if isinstance(case, AttentionCase) else {"x": (case.rows, case.columns)}
    )
    try:
        generator = cupy.random.default_rng(seed)
        return {
            name: generator.standard_normal(shape, dtype=np.float32).astype(np.dtype(case.dtype))
            for name, shape in shapes.items()
        }
    except (ImportError, TypeError, ValueError):  # no cuRAND, or no conversion to this dtype: seconds slower
        return case.make_inputs(seed, cupy)
