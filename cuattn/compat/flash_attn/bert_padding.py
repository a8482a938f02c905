"""Padded batches without their padding, and back, by the names of flash_attn.bert_padding."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn.compat.arguments import whole_number
from cuattn.compat.names import PADDING
from cuattn.errors import ArgumentError, DTypeError, ShapeError
from cuattn.ops.padding.plan import MAX_SLOTS, padding_plan, remove_padding
from cuattn.runtime.executor import Executor, executor_for
from cuattn.runtime.renaming import renamed

__all__ = ["index_first_axis", "pad_input", "unpad_input"]


@renamed(PADDING)
def unpad_input(hidden_states: Any, attention_mask: Any, unused_mask: Any = None) -> tuple[Any, Any, Any, int, Any]:
    """The tokens of a padded batch, one sequence after another: `cuattn.padding_plan` and `cuattn.remove_padding`.

    Parameters
    ----------
    hidden_states : array [batch, seqlen, ...]
    attention_mask : bool or integers [batch, seqlen]
        Nonzero: a token.
    unused_mask : bool or integers [batch, seqlen], optional
        Nonzero: a token that is kept in its place but does not count as used.

    Returns
    -------
    hidden_states : array [total, ...]
        Of both masks.
    indices : int64 [total]
        Where each was in the flattened batch.
    cu_seqlens : int32 [batch + 1]
        The first token of each sequence, and ``total``.
    max_seqlen_in_batch : int
        Tokens of the longest sequence. Their number decides the shape of the result: a mask on a GPU is waited for,
        once.
    seqused : int32 [batch]
        Tokens of ``attention_mask`` in each sequence.

    Raises
    ------
    ShapeError
        Masks of other shapes.
    CuattnError
        What `cuattn.padding_plan` and `cuattn.remove_padding` refuse.

    References
    ----------
    Zhai et al., "ByteTransformer", 2022 (arXiv:2210.03052).

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.compat.flash_attn.bert_padding import unpad_input
    >>> x, indices, cu_seqlens, longest, used = unpad_input(np.array([[1, 2], [3, 4]]), np.array([[1, 0], [1, 1]]))
    >>> x, indices, cu_seqlens, longest, used
    (array([1, 3, 4]), array([0, 2, 3]), array([0, 1, 3], dtype=int32), 2, array([1, 2], dtype=int32))
    """
    masks = {"attention_mask": attention_mask} | ({} if unused_mask is None else {"unused_mask": unused_mask})
    executor = executor_for(hidden_states=hidden_states, **masks)
    arrays = {name: executor.asarray(name, x) for name, x in masks.items()}
    for name, mask in arrays.items():
        if mask.dtype.kind not in "biu":
            raise DTypeError(f"{name} has dtype {mask.dtype}; bool and integer types are allowed")
        if mask.ndim != 2 or mask.shape != arrays["attention_mask"].shape:
            raise ShapeError(
                f"{name} has shape {tuple(mask.shape)}; [batch, seqlen] is needed, the same for both masks"
            )
    with executor.on_device():
        used = arrays["attention_mask"] != 0
        either = used if unused_mask is None else used | (arrays["unused_mask"] != 0)
        seqused = used.sum(axis=1).astype(np.int32)
    plan = padding_plan(either)
    tokens = remove_padding(hidden_states, plan)
    return tokens, plan.indices.astype(np.int64), plan.cu_seqlens, plan.max_seqlen, seqused


def pad_input(hidden_states: Any, indices: Any, batch: int, seqlen: int) -> Any:
    """The padded batch of packed tokens, with zeros elsewhere: the inverse of `unpad_input`.

    Parameters
    ----------
    hidden_states : array [total, ...]
    indices : integers [total]
        Where each token goes in the flattened batch; no two to one place.
    batch, seqlen : int

    Returns
    -------
    array [batch, seqlen, ...]

    Raises
    ------
    ShapeError
        ``indices`` is not as above.
    ArgumentError
        ``batch`` or ``seqlen`` is no integer from 0 on; an index, where the host sees it, that is outside of the batch.
    CuattnError
        An argument is no array of the kinds that are allowed.

    References
    ----------
    Zhai et al., "ByteTransformer", 2022 (arXiv:2210.03052).

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.compat.flash_attn.bert_padding import pad_input
    >>> pad_input(np.array([1, 3, 4]), np.array([0, 2, 3]), 2, 2)
    array([[1, 0],
           [3, 4]])
    """
    batch, seqlen = (
        whole_number(name, x, "an integer from 0 on") for name, x in (("batch", batch), ("seqlen", seqlen))
    )
    if batch * seqlen > MAX_SLOTS:
        raise ArgumentError(f"batch is {batch} and seqlen is {seqlen}; at most {MAX_SLOTS} places are allowed")
    executor, x, places = _indexed(
        *("hidden_states", hidden_states, indices, batch * seqlen), f"batch {batch} and seqlen {seqlen}"
    )
    if tuple(places.shape) != tuple(x.shape[:1]):
        raise ShapeError(
            f"indices has shape {tuple(places.shape)}; [{x.shape[0]}] is needed, one a token of hidden_states"
        )
    with executor.on_device():
        padded = executor.xp.zeros((batch * seqlen, *x.shape[1:]), x.dtype)
        padded[places] = x
    return padded.reshape(batch, seqlen, *x.shape[1:])


def index_first_axis(input: Any, indices: Any) -> Any:
    """Rows of an array: ``input[indices]``.

    Parameters
    ----------
    input : array [rows, ...]
    indices : integers [total]
        From 0 to rows - 1.

    Returns
    -------
    array [total, ...]

    Raises
    ------
    ShapeError
        ``indices`` has another rank than 1, or ``input`` has none.
    ArgumentError
        An index, where the host sees it, that ``input`` does not have.
    CuattnError
        An argument is no array of the kinds that are allowed.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.compat.flash_attn.bert_padding import index_first_axis
    >>> index_first_axis(np.array([[1], [2], [3]]), np.array([2, 0]))
    array([[3],
           [1]])
    """
    rows = executor_for(input=input).asarray("input", input)
    executor, x, places = _indexed(
        *("input", rows, indices, rows.shape[0] if rows.ndim else 0), f"an input of shape {tuple(rows.shape)}"
    )
    with executor.on_device():
        return x[places]


def _indexed(name: str, x: Any, indices: Any, length: int, rows: str) -> tuple[Executor, Any, Any]:
    """The executor, ``x`` and the indices on it, which lie in ``length`` rows where the host sees them."""
    executor = executor_for(**{name: x})
    x, places = executor.asarray(name, x), executor.metadata("indices", indices)
    if x.ndim < 1:
        raise ShapeError(f"{name} has shape (); a first axis is needed")
    if max(x.shape) > MAX_SLOTS:
        raise ShapeError(f"{name} has shape {tuple(x.shape)}; an extent may be at most {MAX_SLOTS}")
    if places.size == 0 and places.dtype == np.float64:  # a list without elements
        places = places.astype(np.int64)
    if places.dtype.kind not in "iu":
        raise DTypeError(f"indices has dtype {places.dtype}; integers are needed")
    if places.ndim != 1:
        raise ShapeError(f"indices has shape {tuple(places.shape)}; one axis is needed")
    if isinstance(places, np.ndarray) and places.size and not 0 <= int(places.min()) <= int(places.max()) < length:
        wrong = int(places.min()) if places.min() < 0 else int(places.max())
        raise ArgumentError(f"indices holds {wrong}; 0 to {length - 1} are allowed, for {rows}")
    return executor, x, executor.put(places, np.int64)
