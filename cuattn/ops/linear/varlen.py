"""Linear attention of sequences of different lengths, packed one after another without padding."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

from cuattn.errors import ShapeError
from cuattn.ops.linear.arguments import check
from cuattn.ops.linear.launch import forward
from cuattn.ops.linear.options import FeatureMap, LinearKeywords
from cuattn.ops.linear.sequences import as_list, check_sequences
from cuattn.ops.linear.state import LinearState
from cuattn.runtime.executor import executor_for
from cuattn.scalars import check_flag
from cuattn.typing import ArrayT

__all__ = ["linear_attention_varlen"]


@overload
def linear_attention_varlen(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    cu_seqlens: Any,
    *,
    return_state: Literal[False] = ...,
    **keywords: Unpack[LinearKeywords],
) -> ArrayT: ...
@overload
def linear_attention_varlen(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    cu_seqlens: Any,
    *,
    return_state: Literal[True],
    **keywords: Unpack[LinearKeywords],
) -> tuple[ArrayT, LinearState]: ...
@overload
def linear_attention_varlen(
    q: ArrayT, k: ArrayT, v: ArrayT, cu_seqlens: Any, *, return_state: bool, **keywords: Unpack[LinearKeywords]
) -> ArrayT | tuple[ArrayT, LinearState]: ...
def linear_attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens: Any,
    *,
    causal: bool = True,
    feature_map: FeatureMap | None = "elu1",
    normalize: bool = True,
    eps: float = 0.0,
    scale: float | None = None,
    decay: Any = None,
    initial_state: Any = None,
    return_state: bool = False,
    chunk: int | None = None,
    out: Any = None,
    state_out: Any = None,
) -> Any:
    """`cuattn.linear_attention` of each sequence of a packed batch; sequences never see each other.

    Parameters
    ----------
    q : array [T, H, D]
        The queries of all sequences, one sequence after another. Dtypes, strides, heads as for
        `cuattn.linear_attention`.
    k : array [T, Gk, D], dtype of ``q``
    v : array [T, Gv, E], dtype of ``q``
    cu_seqlens : int32 [batch + 1]
        Sequence b has the tokens cu_seqlens[b] to cu_seqlens[b + 1] - 1. It begins with 0, ascends, and ends with T; a
        sequence may be empty. A NumPy array or a list, also beside CuPy arrays, is checked before anything runs. An
        array on the GPU is not waited for; entries that lead outside of ``q`` are cut.
    decay : array [G], [T, G] or [T, G, D], optional
    initial_state, state_out : LinearState, optional
        One state for each sequence: s [batch, G, D, E], z [batch, G, D]. An empty sequence returns its own.
    out : array [T, O, E], dtype of ``q``, optional
    causal, feature_map, normalize, eps, scale, return_state, chunk
        As for `cuattn.linear_attention`. Without ``causal`` every query reads the state after its sequence's last key.

    Returns
    -------
    out : array [T, O, E], dtype of ``q``
    state : LinearState, of ``batch`` sequences; only with ``return_state``

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, ArgumentError, NonFiniteError, OverlapError
        As for `cuattn.linear_attention`; ArgumentError also for ``cu_seqlens`` that descend, do not begin with 0 or do
        not end with the number of tokens, where the host knows them (or with ``CUATTN_CHECK=1``, which waits for the
        GPU).

    Examples
    --------
    Sequences of one, none and two tokens:

    >>> import numpy as np
    >>> import cuattn
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 3, 1, 16)).astype(np.float32)
    >>> out, state = cuattn.linear_attention_varlen(q, k, v, [0, 1, 1, 3], return_state=True)
    >>> out.shape, state.s.shape, bool(np.allclose(out[0], v[0])), bool((state.s[1] == 0).all())
    ((3, 1, 16), (3, 1, 16, 16), True, True)
    """
    wanted = check_flag("return_state", return_state)
    arrays = {"q": q, "k": k, "v": v}
    places = as_list(executor_for(**arrays), cu_seqlens)
    problem = check(
        q,
        k,
        v,
        batch=places.size - 1,
        causal=causal,
        feature_map=feature_map,
        normalize=normalize,
        eps=eps,
        scale=scale,
        decay=decay,
        initial_state=initial_state,
        chunk=chunk,
        out=out,
        state_out=state_out,
    )
    listed, longest = check_sequences(problem.executor, places, problem.extents.seqlen_k)
    extents = problem.extents
    if extents.seqlen_q != extents.seqlen_k:
        raise ShapeError(f"q has {extents.seqlen_q} tokens and k has {extents.seqlen_k}; both are listed in cu_seqlens")
    result, state = forward(problem, cu_seqlens=listed, max_seqlen=longest, need_state=wanted)
    return (result, state) if wanted else result
