"""Linear attention over a sequence that is divided among ranks: what each makes of its tokens is all that moves.

Weigao Sun et al., "LASP: linear attention sequence parallelism", 2024 (arXiv:2404.02882).
"""

from __future__ import annotations

from typing import Any

from cuattn.distributed.group import Group
from cuattn.distributed.linear_scan import Scan
from cuattn.ops.linear.backward import LinearGrads
from cuattn.ops.linear.backward import linear_attention_backward as gradients_of_one_rank
from cuattn.ops.linear.dense import linear_attention as of_one_rank
from cuattn.ops.linear.options import FeatureMap
from cuattn.scalars import check_flag
from cuattn.typing import ArrayT

__all__ = ["linear_attention", "linear_attention_backward"]


def linear_attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    group: Group,
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
) -> Any:
    """`cuattn.linear_attention` of a sequence of which each rank holds a part.

    Rank 0 holds the first tokens, rank 1 those that follow, and so on, as many as they like: the partition "contiguous"
    is one such. Every rank sends the others the state that its tokens make of nothing, and what they leave of one
    before; from these it has the state that its own tokens begin with.

    Parameters
    ----------
    q : array [batch, tokens, heads, head_dim]; float16, bfloat16, float32 or float64
    k : array [batch, tokens, key heads, head_dim], dtype of ``q``
    v : array [batch, tokens, value heads, head_dim_v], dtype of ``q``
        The tokens of this rank.
    group : Group
        All of whose ranks make this call.
    causal, feature_map, normalize, eps, scale, chunk
        As for `cuattn.linear_attention`.
    decay : array [G], [batch, tokens, G] or [batch, tokens, G, head_dim], optional
        That of this rank's tokens.
    initial_state : LinearState, optional
        The state before the first token of rank 0; the same on every rank.
    return_state : bool
        Return also the state after the last token of the last rank: the same on every rank.

    Returns
    -------
    out : array [batch, tokens, outputs, head_dim_v], dtype of ``q``
        Of this rank's tokens.
    state : LinearState; only with ``return_state``

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, NonFiniteError, ArgumentError
        As for `cuattn.linear_attention`.
    MismatchError, PeerError, GroupTimeoutError
        As for `ring_attention`.

    References
    ----------
    Sun et al., "LASP: linear attention sequence parallelism", 2024.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> from cuattn.distributed import ThreadGroup, linear_attention, shard, unshard
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 50, 2, 16)).astype(np.float32)
    >>> def of_rank(group):
    ...     parts = (shard(x, group, partition="contiguous") for x in (q, k, v))
    ...     return unshard(linear_attention(*parts, group), group, partition="contiguous")
    >>> bool(np.allclose(ThreadGroup.run(3, of_rank)[0], cuattn.linear_attention(q, k, v), atol=1e-5))
    True
    """
    check_flag("return_state", return_state)
    options: dict[str, Any] = {"causal": causal, "feature_map": feature_map, "normalize": normalize, "eps": eps}
    options |= {"scale": scale, "chunk": chunk}
    scan = Scan.of(group, "linear_attention", (q, k, v), options, decay, initial_state)
    with group.together():
        before, last = scan.states()
        if causal:
            out = of_one_rank(q, k, v, decay=decay, initial_state=before, **options)
        else:
            out = of_one_rank(q, *scan.no_keys(k, v), initial_state=last, **options)
    return (out, last) if return_state else out


def linear_attention_backward(
    dout: ArrayT,
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    group: Group,
    *,
    causal: bool = True,
    feature_map: FeatureMap | None = "elu1",
    normalize: bool = True,
    eps: float = 0.0,
    scale: float | None = None,
    decay: Any = None,
    initial_state: Any = None,
    chunk: int | None = None,
    dstate: Any = None,
) -> LinearGrads[ArrayT]:
    """Gradients of ``(out * dout).sum()`` over all ranks, and of the returned state times ``dstate``.

    As in forward, states move and nothing else: first that before each rank's tokens, then the gradient of that behind
    them. Each rank computes its gradients twice: once for the gradient of its own initial state, and, the last rank
    apart, once more with what the ranks behind it make of its state.

    Parameters
    ----------
    dout : array [batch, tokens, outputs, head_dim_v], dtype of ``q``
    q, k, v, group, causal, feature_map, normalize, eps, scale, decay, initial_state, chunk
        As for `linear_attention`.
    dstate : LinearState, optional
        Gradient of the state that it returns; the same on every rank.

    Returns
    -------
    LinearGrads(dq, dk, dv, ddecay, dbeta=None, dinitial_state)
        dq, dk and dv of this rank's tokens. ddecay too, but for a decay [G] the sum over all ranks; dinitial_state is
        the same on every rank.

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, NonFiniteError, ArgumentError
        As for `cuattn.linear_attention_backward`.
    MismatchError, PeerError, GroupTimeoutError
        As for `ring_attention`.

    Examples
    --------
    >>> import numpy as np
    >>> from cuattn.distributed import ThreadGroup, linear_attention_backward
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 40, 2, 16)).astype(np.float32)
    >>> def of_rank(group):
    ...     mine = slice(20 * group.rank, 20 * group.rank + 20)
    ...     return linear_attention_backward(np.ones_like(v[:, mine]), *(x[:, mine] for x in (q, k, v)), group).dv.sum()
    >>> print(round(float(sum(ThreadGroup.run(2, of_rank)))))  # weights that sum to 1, for each query and head
    1280
    """
    options: dict[str, Any] = {"causal": causal, "feature_map": feature_map, "normalize": normalize, "eps": eps}
    options |= {"scale": scale, "chunk": chunk}
    extra = {"dout": dout} if dstate is None else {"dout": dout, "dstate": dstate}
    scan = Scan.of(group, "linear_attention_backward", (q, k, v), options, decay, initial_state, extra)
    with group.together():
        before, last = scan.states()
        if not causal:
            return scan.gradients_of_all(dout, last, dstate)
        given = {**options, "decay": decay, "initial_state": before}
        grads = gradients_of_one_rank(dout, q, k, v, **given)
        assert grads.dinitial_state is not None
        behind, first = scan.states_backward(grads.dinitial_state, dstate)
        if behind is not None:
            grads = gradients_of_one_rank(dout, q, k, v, **given, dstate=behind)
        ddecay = grads.ddecay
        if ddecay is not None and ddecay.ndim == 1:
            ddecay = group.all_reduce(ddecay)
        return grads._replace(ddecay=ddecay, dinitial_state=first if initial_state is not None else None)
