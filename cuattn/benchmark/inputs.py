"""Random inputs of a case, made where they will be used."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn.testing.backward_cases import BackwardCase, VarlenBackwardCase
from cuattn.testing.cases import AttentionCase, Case, SoftmaxCase, VarlenCase
from cuattn.testing.decode_cases import DecodeCase


def make(case: Case, executor: str, seed: int) -> dict[str, Any]:
    """Standard normal arrays: NumPy's for ``"host"``, CuPy's for ``"cuda"``; and the case's other inputs."""
    if executor == "host":
        return case.make_inputs(seed)
    import cupy

    if isinstance(case, BackwardCase | VarlenBackwardCase):
        return case.with_results(make(case.forward, executor, seed), seed, cupy)
    if isinstance(case, SoftmaxCase):
        shapes: dict[str, tuple[int, ...]] = {"x": (case.rows, case.columns)}
    elif isinstance(case, AttentionCase | VarlenCase) or (
        isinstance(case, DecodeCase) and case.kv_format is None and not case.sinks
    ):
        shapes = dict(case.shapes)
    else:
        return case.make_inputs(seed, cupy)
    try:
        generator = cupy.random.default_rng(seed)
        arrays = {
            name: generator.standard_normal(shape, dtype=np.float32).astype(np.dtype(case.dtype))
            for name, shape in shapes.items()
        }
    except (ImportError, TypeError, ValueError):  # no cuRAND, or no conversion to this dtype: seconds slower
        return case.make_inputs(seed, cupy)
    if isinstance(case, DecodeCase):
        arrays |= case.host_inputs(np.random.default_rng(seed))
    elif not isinstance(case, SoftmaxCase):
        options = case.option_inputs(np.random.default_rng(seed))
        arrays |= {name: cupy.asarray(x) for name, x in options.items()}
    return arrays
