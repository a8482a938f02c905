"""The state of a softmax whose rows arrive in pieces.

Maxim Milakov and Natalia Gimelshein, "Online normalizer calculation for softmax", 2018 (arXiv:1805.02867).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cuattn.dtypes import ELEMENT_TYPES
from cuattn.errors import ArgumentError, ArrayTypeError, DTypeError, ShapeError
from cuattn.messages import shown
from cuattn.ops.softmax import rows
from cuattn.ops.softmax.arguments import accumulator
from cuattn.ops.softmax.config import (
    ALGORITHMS,
    MAX_GRID_X,
    MAX_GRID_Y,
    OUTPUTS,
    STREAM_SHORT,
    SoftmaxConfig,
    select_streaming,
    shape_constants,
)
from cuattn.ops.softmax.rows import RowView
from cuattn.runtime.arrays import contiguous, full
from cuattn.runtime.checks import check_extents
from cuattn.runtime.executor import Executor, Kernel, executor_for, executor_of_module
from cuattn.scalars import MAX_EXTENT, as_integer, check_dtype

__all__ = ["OnlineSoftmax"]


class OnlineSoftmax:
    """Running softmax of rows that are seen a piece at a time: a maximum m and a sum d a row.

    ``update`` takes a piece into the state: m' = max(m, max x), d' = d·e^(m - m') + Σ e^(x - m'). Any cutting of a row
    into pieces, in any order, gives what the whole row gives, within rounding; so does merging states of parts of it.

    Parameters
    ----------
    shape : int or sequence of int
        Shape of the rows; each may be 0.
    dtype : dtype
        Of the elements: float16, bfloat16, float32 or float64. The state is float32 (float64 for float64).
    array_module : module, optional
        ``numpy`` or ``cupy``. Without it the first update (or merge) decides.

    Raises
    ------
    ShapeError
        A negative extent, or one of 2**31 or more.
    DTypeError
        A dtype that is not in the list.
    ArrayTypeError
        ``array_module`` is neither module.

    References
    ----------
    Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> state = cuattn.OnlineSoftmax((1,), np.float32)
    >>> state.update(np.zeros((1, 3), np.float32))
    >>> state.update(np.zeros((1, 5), np.float32))
    >>> state.probabilities(np.zeros((1, 2), np.float32))
    array([[0.125, 0.125]], dtype=float32)
    """

    def __init__(self, shape: int | Sequence[int], dtype: Any = np.float32, *, array_module: Any = None) -> None:
        self.shape = _shape(shape)
        self.dtype: np.dtype[Any] = check_dtype("dtype", dtype, ELEMENT_TYPES)
        self._states: Any = None  # [*shape, 2]: (m, d), as struct RowState of the kernels
        if array_module is not None:
            self._allocate(executor_of_module(array_module))

    def __repr__(self) -> str:
        return f"OnlineSoftmax({self.shape}, {self.dtype})"

    @property
    def row_max(self) -> Any:
        """m [*shape], float32 (float64 for float64): the largest element seen; -inf for none."""
        return self._known_states()[..., 0].copy()

    @property
    def row_sum(self) -> Any:
        """d [*shape], float32 (float64 for float64): the sum of e^(x - m) over the elements seen; 0 for none."""
        return self._known_states()[..., 1].copy()

    def update(self, x: Any) -> None:
        """Take one more piece of every row into the state.

        Parameters
        ----------
        x : array [*shape, n] of the dtype of the state; n >= 0
            Any strides.

        Raises
        ------
        ArrayTypeError
            ``x`` is no array, or not where the state is.
        DTypeError, ShapeError
            Another dtype or shape.
        """
        executor, x = self._piece(x)
        self._allocate(executor)
        if x.size == 0:
            return
        x, layout = _fold(executor, x, x)
        config = select_streaming(
            num_rows=layout.num_rows, num_cols=layout.num_cols, lanes_span_rows=layout.lanes_span_rows
        )
        constants = self._constants(config, layout)
        block, grid_rows = (config.num_threads,), min(config.row_groups(layout.num_rows), config.max_ctas)
        if config.path == "stream":
            update = executor.kernel("online_softmax_state", constants, "cuattn_online_softmax_update")
            args = {"g_x": x, "g_states": self._states, "layout": layout.pack(layout.num_cols)}
            executor.launch(update, (grid_rows,), block, args)
            return
        chunk_cols = config.chunk_cols(layout.num_cols)
        num_chunks = -(-layout.num_cols // chunk_cols)
        partial = executor.kernel("softmax_split", _with_output(constants), "cuattn_softmax_partial")
        states = executor.empty((layout.num_rows, num_chunks, 2), self._states.dtype)
        args = {"g_x": x, "g_states": states, "layout": layout.pack(chunk_cols)}
        executor.launch(partial, (num_chunks, grid_rows), block, args)
        self._merge(executor, states, num_chunks)

    def merge(self, other: OnlineSoftmax) -> None:
        """Take everything that ``other`` has seen into this state; ``other`` stays as it is.

        Associative and commutative (the latter bit for bit).

        Parameters
        ----------
        other : OnlineSoftmax of the same shape and dtype

        Raises
        ------
        ArrayTypeError
            ``other`` is no OnlineSoftmax, or not where this state is.
        DTypeError, ShapeError
            Another dtype or shape.
        """
        if not isinstance(other, OnlineSoftmax):
            raise ArrayTypeError(f"other: {type(other).__name__}; an OnlineSoftmax is allowed")
        if other.shape != self.shape:
            raise ShapeError(f"other: shape {other.shape}; this state has shape {self.shape}")
        if other.dtype != self.dtype:
            raise DTypeError(f"other: dtype {other.dtype}; this state has dtype {self.dtype}")
        if other._states is None:
            return
        executor = (
            executor_for(other=other._states)
            if self._states is None
            else executor_for(state=self._states, other=other._states)
        )
        self._allocate(executor)
        if self._states.size:
            self._merge(executor, other._states, 1)

    def logsumexp(self) -> Any:
        """Return the log-sum-exp of what was seen, [*shape], float32 (float64 for float64); -inf for rows of nothing.

        Raises
        ------
        ArgumentError
            Nothing has been seen yet and no ``array_module`` was given.
        """
        states = self._known_states()
        executor = executor_for(state=states)
        lse = executor.empty(self.shape, states.dtype)
        if lse.size:
            kernel = self._state_kernel(executor, "cuattn_online_softmax_logsumexp")
            grid = min(-(-lse.size // STREAM_SHORT.num_threads), MAX_GRID_X)
            args = {"g_states": states, "g_lse": lse, "num_rows": np.int64(lse.size)}
            executor.launch(kernel, (grid,), (STREAM_SHORT.num_threads,), args)
        executor.finish(lse)
        return lse

    def probabilities(self, x: Any) -> Any:
        """Return ``e^(x - m) / d``: the softmax of the elements ``x`` within the rows seen so far.

        Parameters
        ----------
        x : array [*shape, n] of the dtype of the state; n >= 0
            Usually a piece that was given to `update`; any strides.

        Returns
        -------
        array [*shape, n], dtype of ``x``; zeros for rows that saw nothing but -inf

        Raises
        ------
        ArrayTypeError, DTypeError, ShapeError
            As for `update`.
        ArgumentError
            Nothing has been seen yet and no ``array_module`` was given.
        """
        states = self._known_states()
        executor, x = self._piece(x)
        out = executor.empty(x.shape, x.dtype)
        if x.size:
            x, layout = _fold(executor, x, out)
            config = select_streaming(
                num_rows=layout.num_rows, num_cols=layout.num_cols, lanes_span_rows=layout.lanes_span_rows
            )
            chunk_cols = config.chunk_cols(layout.num_cols) if config.path == "split" else layout.num_cols
            grid = (-(-layout.num_cols // chunk_cols), min(config.row_groups(layout.num_rows), MAX_GRID_Y))
            constants = _with_output(self._constants(config, layout))
            kernel = executor.kernel("softmax_split", constants, "cuattn_softmax_finish")
            args = {"g_x": x, "g_states": states, "g_out": out, "num_states": np.uint32(1)}
            args["layout"] = layout.pack(chunk_cols)
            executor.launch(kernel, grid, (config.num_threads,), args)
        executor.finish(out)
        return out

    def _known_states(self) -> Any:
        if self._states is None:
            raise ArgumentError("nothing has been seen yet: update the state first, or create it with array_module=")
        return self._states

    def _piece(self, x: Any) -> tuple[Executor, Any]:
        """Check ``x``; returns it and the executor that it and the state are on."""
        executor = executor_for(x=x) if self._states is None else executor_for(state=self._states, x=x)
        x = executor.asarray("x", x)
        if x.dtype != self.dtype:
            raise DTypeError(f"x: dtype {x.dtype}; this state has dtype {self.dtype}")
        if x.ndim == 0 or tuple(x.shape[:-1]) != self.shape:
            raise ShapeError(f"x: shape {tuple(x.shape)}; {(*self.shape, 'n')} is allowed, with any n")
        check_extents("x", x.shape)
        return executor, x

    def _allocate(self, executor: Executor) -> None:
        if self._states is None:
            self._states = full(executor, (*self.shape, 2), -np.inf, accumulator(self.dtype))
            self._states[..., 1] = 0

    def _constants(self, config: SoftmaxConfig, layout: RowView) -> dict[str, int | bool | float | str]:
        vectorized = layout.vectorized and not config.lanes_span_rows
        return {**shape_constants(config, self.dtype.name, vectorized), "ALGORITHM": ALGORITHMS["online"]}

    def _merge(self, executor: Executor, others: Any, num_others: int) -> None:
        """Merge ``others`` [*shape, num_others, 2] into the state."""
        kernel = self._state_kernel(executor, "cuattn_online_softmax_merge")
        num_rows = self._states.size // 2
        grid = min(STREAM_SHORT.row_groups(num_rows), STREAM_SHORT.max_ctas)
        args = {
            "g_states": self._states,
            "g_others": others,
            "num_rows": np.int64(num_rows),
            "num_others": np.uint32(num_others),
        }
        executor.launch(kernel, (grid,), (STREAM_SHORT.num_threads,), args)

    def _state_kernel(self, executor: Executor, entry: str) -> Kernel:
        """Load a kernel that sees states only: one compiled variant serves all elements of up to 4 bytes."""
        constants = shape_constants(STREAM_SHORT, self._states.dtype.name, False)
        return executor.kernel("online_softmax_state", {**constants, "ALGORITHM": ALGORITHMS["online"]}, entry)


def _with_output(constants: dict[str, int | bool | float | str]) -> dict[str, int | bool | float | str]:
    return {**constants, "OUTPUT": OUTPUTS["softmax"]}


def _fold(executor: Executor, x: Any, out: Any) -> tuple[Any, RowView]:
    """Return ``x``, or a contiguous copy of it, and its rows."""
    layout = rows.fold(x, out, x.ndim - 1)
    if layout is None:
        copy = contiguous(executor, x)
        layout = rows.fold(copy, copy if out is x else out, x.ndim - 1)
        assert layout is not None, "contiguous arrays have at most one outer axis"
        x = copy
    return x, layout


def _shape(shape: Any) -> tuple[int, ...]:
    given = shape if isinstance(shape, tuple | list) else (shape,)
    extents = tuple(-1 if (extent := as_integer(x)) is None else extent for x in given)
    if not all(0 <= extent <= MAX_EXTENT for extent in extents):
        raise ShapeError(f"shape is {shown(shape)}; integers from 0 to {MAX_EXTENT} are allowed, in a sequence or one")
    if math.prod(extents) >= 2**62:
        raise ShapeError(f"shape is {extents}: so many rows cannot be counted")
    return extents
