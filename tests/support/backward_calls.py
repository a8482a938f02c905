"""Backward calls with NumPy arrays, on any executor: what forward saved, the gradients, and whether they are right.

>>> saved = after_forward(executor, q, k, v, causal=True)
>>> grads = assert_right(executor, saved)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from attention_calls import call, call_varlen, prepare

import cuattn
from cuattn import reference
from cuattn.testing import assert_gradients_close, assert_varlen_gradients_close, kernels
from cuattn.testing.arrays import Guarded, place
from cuattn.testing.backward_problems import fill_dout
from cuattn.testing.gradient_tolerance import gradient_bound
from cuattn.testing.rounding import accumulation_dtype
from cuattn.testing.strategies import fill
from cuattn.testing.tolerance import assert_within


@dataclass(frozen=True)
class Saved:
    """The arrays of a backward call in their order (guarded or not), and the options of the forward call.

    `starts` are cu_seqlens_q and cu_seqlens_k of a packed call, else ().
    """

    dout: Any
    q: Any
    k: Any
    v: Any
    out: Any
    lse: Any
    options: dict[str, Any] = field(default_factory=dict)
    dlse: Any = None
    starts: tuple[Any, ...] = ()

    @property
    def arrays(self) -> list[Any]:
        """dout, q, k, v, out, lse as NumPy views."""
        return [plain(x) for x in (self.dout, self.q, self.k, self.v, self.out, self.lse)]

    def but(self, **changes: Any) -> Saved:
        """The same call with other arrays or other options."""
        return replace(self, **changes)


def plain(x: Any) -> Any:
    return x.array if isinstance(x, Guarded) else x


def after_forward(executor, q, k, v, *starts, dout=None, dlse=None, kind="normal", seed=0, layout=None, **options):
    """What a forward call saves, and a dout of the `kind`; `dlse` may be True for normal numbers, False for none."""
    run = call_varlen if starts else call
    out, lse = run(executor, q, k, v, *starts, **options)
    rng = np.random.default_rng(seed + 1000)
    if dout is None:
        dout = place(fill_dout(out.shape, out.dtype, kind, rng), layout)
    if isinstance(dlse, bool):
        dlse = fill(lse.shape, accumulation_dtype(out.dtype), "normal", rng) if dlse else None
    return Saved(dout, q, k, v, out, lse, options, dlse, starts)


def after_reference(q, k, v, *, seed=0, **options):
    """What plain code saves of a call, a dout and a dlse: where a forward kernel would be compiled for nothing."""
    out, lse = reference.attention_naive(q, k, v, **options)
    rng = np.random.default_rng(seed + 1000)
    dout, dlse = fill(out.shape, out.dtype, "normal", rng), fill(lse.shape, lse.dtype, "normal", rng)
    return Saved(dout, q, k, v, out, lse, options, dlse)


def of_problem(executor, problem):
    """The call of a drawn `GradientProblem`."""
    forward, dlse = problem.forward, problem.dlse
    starts = forward.arrays[3:]
    arrays = forward.q, forward.k, forward.v
    return after_forward(executor, *arrays, *starts, dout=problem.dout, dlse=dlse, **forward.options)


def call_backward(executor, saved, **extra):
    """The gradients as NumPy arrays; `extra` are options of the backward call, or of that of `kernels`."""
    arrays, options = prepare(executor, (saved.dout, saved.q, saved.k, saved.v, saved.out, saved.lse), saved.options)
    dlse = None if saved.dlse is None else executor.array(saved.dlse)
    if {"configs", "schedule_on_device"} & set(extra):
        function = kernels.attention_varlen_backward if saved.starts else kernels.attention_backward
    else:
        function = cuattn.attention_varlen_backward if saved.starts else cuattn.attention_backward
    grads = function(*arrays, *saved.starts, dlse=dlse, **options, **extra)
    return type(grads)(*(None if x is None else executor.numpy(x) for x in grads))


def assert_gradients_right(grads, saved):
    """The gradients agree with the reference."""
    dlse = plain(saved.dlse)
    check = assert_varlen_gradients_close if saved.starts else assert_gradients_close
    check(grads, *saved.arrays, *saved.starts, dlse=dlse, **saved.options)


def assert_right(executor, saved, **extra):
    """The call agrees with the reference; its gradients are returned."""
    grads = call_backward(executor, saved, **extra)
    assert_gradients_right(grads, saved)
    return grads


def bounds(saved):
    """(reference, bound) of the gradients, each a named tuple; not for packed calls."""
    return gradient_bound(*saved.arrays, dlse=plain(saved.dlse), **saved.options)


def assert_same(grads, expected, bound, names=("dq", "dk", "dv")):
    """Two right answers to one problem differ by twice its bound at most."""
    for name in names:
        want = np.asarray(getattr(expected, name)).astype(np.float64)
        assert_within(getattr(grads, name), want, 2 * np.asarray(getattr(bound, name)), name)


def same_bits(one, other):
    """Whether two results hold the same bits, gradient by gradient."""
    return all(
        x is y if x is None or y is None else x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        for x, y in zip(one, other, strict=True)
    )
