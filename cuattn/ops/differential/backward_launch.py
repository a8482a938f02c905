"""The way from a checked backward problem to its launches: rows, then the kernels of attention backward.

Where both streams read one key head, they are an attention of twice as many heads, and one call of its backward sums
the gradients of keys and values over all of them. Otherwise each stream is a call, over views of q and k, and the two
gradients of v are added. Neither copies anything of the size of its inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple

import numpy as np

from cuattn.ops.attention.arguments import Extents, Problem
from cuattn.ops.attention.backward import launch as attention_backward
from cuattn.ops.attention.backward.problem import BackwardProblem
from cuattn.ops.attention.option_checks import LogitArray
from cuattn.ops.attention.options import Options
from cuattn.ops.differential.arguments import DifferentialProblem
from cuattn.ops.differential.backward_arguments import Saved
from cuattn.ops.differential.rows import RowGradients, add, go_through_rows
from cuattn.runtime.arrays import contiguous, zeros
from cuattn.typing import ArrayT

__all__ = ["DifferentialGrads", "backward"]


class DifferentialGrads(NamedTuple, Generic[ArrayT]):
    """Gradients of differential attention.

    Attributes
    ----------
    dq, dk, dv : array, of the shape and dtype of q, k and v
    dlam : array of the shape of lambda, float32 (float64 for float64)
    dnorm_weight : array [head_dim_v], float32 (float64 for float64), or None without a weight
    """

    dq: ArrayT
    dk: ArrayT
    dv: ArrayT
    dlam: Any
    dnorm_weight: Any | None


@dataclass(frozen=True, slots=True, eq=False)
class StreamExtents(Extents):
    """The sizes of one stream, whose rows of lse lie between those of the other."""

    @property
    def lse_strides(self) -> tuple[int, int]:
        return 2 * self.num_heads * self.seqlen_q, 2 * self.seqlen_q


def backward(problem: DifferentialProblem, saved: Saved) -> DifferentialGrads:
    """Launch the kernels of a problem."""
    rows = go_through_rows(problem, saved)
    extents = problem.extents
    if not extents.num_heads:  # keys that no query head reads
        dq, dk, dv = (zeros(problem.executor, x.shape, problem.dtype) for x in (problem.q, problem.k, problem.v))
        return DifferentialGrads(dq, dk, dv, rows.dlam, rows.dnorm_weight)
    whole = _as_one_attention(problem.options, extents.num_heads) if extents.shared_keys else None
    gradients = _by_streams(problem, rows) if whole is None else _together(problem, rows, whole)
    return DifferentialGrads(*gradients, rows.dlam, rows.dnorm_weight)


def _together(problem: DifferentialProblem, rows: RowGradients, options: Options) -> tuple[Any, Any, Any]:
    """Return dq, dk and dv, from one call in which every stream is a head."""
    of = problem.extents
    extents = Extents(of.batch, of.seqlen_q, of.seqlen_k, 2 * of.num_heads, of.num_kv_heads, of.head_dim, of.head_dim_v)
    arrays = problem.q, problem.k, problem.v
    forward = Problem(problem.executor, *arrays, None, problem.dtype, extents, problem.scale, options)
    grads = _call(forward, rows, rows.douts, (rows.lse, rows.delta), {})
    return grads.dq, grads.dk, grads.dv


def _by_streams(problem: DifferentialProblem, rows: RowGradients) -> tuple[Any, Any, Any]:
    """Return dq, dk and dv, from a call for each stream."""
    executor, of = problem.executor, problem.extents
    sizes = of.batch, of.seqlen_q, of.seqlen_k, of.num_heads, of.num_kv_heads, of.head_dim, of.head_dim_v
    dq = executor.empty(problem.q.shape, problem.dtype)
    real = np.dtype(problem.accumulator)  # of what the streams share, which is added before it is rounded
    dk = executor.empty(*(((2, *problem.k.shape), real) if of.shared_keys else (problem.k.shape, problem.dtype)))
    dv = executor.empty((2, *problem.v.shape), real)
    for stream in range(2):
        k = problem.k if of.shared_keys else problem.k[:, :, stream::2]
        arrays = problem.q[:, :, stream::2], k, problem.v
        options = _of_stream(problem, stream)
        extents = StreamExtents(*sizes)
        forward = Problem(executor, *arrays, None, problem.dtype, extents, problem.scale, options)
        targets = {
            "dq": dq[:, :, stream::2],
            "dk": dk[stream] if of.shared_keys else dk[:, :, stream::2],
            "dv": dv[stream],
        }
        terms = rows.lse[:, :, stream], rows.delta[:, :, stream]
        _call(forward, rows, rows.douts[:, :, stream::2], terms, targets)
    executor.finish(dq)
    if of.shared_keys:
        dk = add(executor, dk, problem.dtype)
    else:
        executor.finish(dk)
    return dq, dk, add(executor, dv, problem.dtype)


def _call(forward: Problem, rows: RowGradients, dout: Any, terms: tuple[Any, Any], targets: dict[str, Any]) -> Any:
    problem = BackwardProblem(
        forward=forward,
        dout=dout,
        out=dout,
        lse=terms[0],
        dlse=None,
        **{name: targets.get(name) for name in ("dq", "dk", "dv")},
        return_dbias=False,
        bias_shape=None,
        deterministic=True,
        workspace=None,
        packed=None,
    )
    return attention_backward.backward(problem, terms=terms)


def _of_stream(problem: DifferentialProblem, stream: int) -> Options:
    """Return the options of a stream, whose heads are the pairs."""
    options = problem.options_of_stream(stream)
    if options.alibi_slopes is not None and options.alibi_slopes.shape[1] != problem.extents.num_heads:
        options.alibi_slopes = contiguous(problem.executor, options.alibi_slopes[:, stream::2])
    if options.dropout is not None:
        options.dropout = options.dropout.of_stream(stream)
    return options


def _as_one_attention(options: Options, num_heads: int) -> Options | None:
    """Return the options with streams as heads; None where a bias or a mask has a head for each pair."""
    given = {name: getattr(options, name) for name in ("bias", "mask")}
    if num_heads > 1 and any(x is not None and x.strides[1] != 2 * x.stream for x in given.values()):
        return None
    slopes = options.alibi_slopes
    if slopes is not None and slopes.shape[1] == num_heads:
        slopes = slopes.repeat(2, axis=1)
    elif options.bias is options.mask is None:
        return options
    heads = {name: None if x is None else _stream_as_head(x) for name, x in given.items()}
    return replace(options, bias=heads["bias"], mask=heads["mask"], alibi_slopes=slopes, shared=False)


def _stream_as_head(x: LogitArray) -> LogitArray:
    batch, _, query, key = x.strides
    sizes = x.array.shape
    return LogitArray(x.array.reshape(sizes[0], sizes[1] * sizes[2], *sizes[3:]), (batch, x.stream, query, key))
