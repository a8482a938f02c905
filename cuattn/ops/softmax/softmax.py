"""softmax, log_softmax and logsumexp along one axis of an array.

Maxim Milakov and Natalia Gimelshein, "Online normalizer calculation for softmax", 2018 (arXiv:1805.02867).
"""

from __future__ import annotations

from cuattn.ops.softmax.arguments import check
from cuattn.ops.softmax.launch import compute
from cuattn.typing import Algorithm, ArrayT

__all__ = ["log_softmax", "logsumexp", "softmax"]


def softmax(x: ArrayT, *, axis: int = -1, algorithm: Algorithm = "online", out: ArrayT | None = None) -> ArrayT:
    """Return ``exp(x) / sum(exp(x))`` along ``axis``.

    A row that is all -inf gives zeros. A NaN or +inf makes its row NaN (with ``"naive"``, a +inf only its own element).

    Parameters
    ----------
    x : array, any shape of rank 1 or more; float16, bfloat16, float32 or float64
        NumPy arrays run on the host executor, CuPy arrays on the GPU. Any strides; contiguous rows whose base and row
        strides are multiples of 16 bytes are the fastest.
    axis : int
        The axis along which the result sums to 1.
    algorithm : {"online", "safe", "naive"}
        ``"online"`` finds maximum and sum in one pass: 2 reads and 1 write of the array, 1 read when a row fits on
        chip. ``"safe"`` finds the maximum first: 3 reads, 1 write. ``"naive"`` subtracts no maximum: 2 reads, 1 write;
        it overflows (inf / inf = NaN) for logits above 88 (709 in float64), and rows whose every exponential
        underflows give zeros. It is here to be compared with.
    out : array, optional; shape and dtype of ``x``
        Where to write the result. It may be ``x`` itself; else it may not lie in the memory range of ``x``.

    Returns
    -------
    array, shape and dtype of ``x``
        Accumulated in float32 (float64 for float64). ``out`` if that was given.

    Raises
    ------
    ArrayTypeError
        ``x`` or ``out`` is no array, or they are not of one kind.
    DTypeError
        A dtype that is not in the list, or an ``out`` of another dtype.
    ShapeError
        Rank 0, an extent of 2**31 or more, or an ``out`` of another shape.
    ArgumentError
        ``axis`` out of range or an unknown ``algorithm``.
    OverlapError
        ``out`` lies in the memory range of ``x`` and is not ``x``, or elements of it share memory.

    References
    ----------
    Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> cuattn.softmax(np.log(np.array([[1.0, 3.0]], np.float32))).round(4)
    array([[0.25, 0.75]], dtype=float32)
    """
    return compute(check("softmax", x, axis=axis, algorithm=algorithm, out=out))


def log_softmax(x: ArrayT, *, axis: int = -1, algorithm: Algorithm = "online", out: ArrayT | None = None) -> ArrayT:
    """Return ``x - log(sum(exp(x)))`` along ``axis``: the logarithm of `softmax`, without its underflow.

    A row that is all -inf gives -inf. Parameters, result, errors and paper are those of `softmax`.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> cuattn.log_softmax(np.array([0.0, -200.0], np.float32))
    array([   0., -200.], dtype=float32)
    """
    return compute(check("log_softmax", x, axis=axis, algorithm=algorithm, out=out))


def logsumexp(
    x: ArrayT, *, axis: int = -1, keepdims: bool = False, algorithm: Algorithm = "online", out: ArrayT | None = None
) -> ArrayT:
    """Return ``log(sum(exp(x)))`` along ``axis``, natural logarithm.

    A row that is all -inf, or has no elements, gives -inf; one with a NaN or +inf gives NaN.

    Parameters
    ----------
    x, axis, algorithm
        As for `softmax`; without its write of the array (online: 1 read, safe: 2, naive: 1).
    keepdims : bool
        Keep ``axis`` in the result, with length 1.
    out : array, optional
        Where to write the result; it may not lie in the memory range of ``x``.

    Returns
    -------
    array, shape of ``x`` without ``axis``
        float32, or float64 for float64: the log-sum-exp of float16 logits may be too large for float16.

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, ArgumentError, OverlapError
        As for `softmax`.

    References
    ----------
    Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> cuattn.logsumexp(np.zeros((2, 8), np.float32), axis=1) / np.log(np.float32(2))
    array([3., 3.], dtype=float32)
    """
    return compute(check("logsumexp", x, axis=axis, algorithm=algorithm, out=out, keepdims=keepdims))
