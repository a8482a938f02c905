"""Linear attention of a batch of equal lengths.

* Angelos Katharopoulos, Apoorv Vyas, Nikolaos Pappas and François Fleuret, "Transformers are RNNs: fast autoregressive
  transformers with linear attention", 2020 (arXiv:2006.16236).
* Yutao Sun et al., "Retentive network: a successor to transformer for large language models", 2023 (arXiv:2307.08621).
* Songlin Yang et al., "Gated linear attention transformers with hardware-efficient training", 2023 (arXiv:2312.06635).
* Tri Dao and Albert Gu, "Transformers are SSMs", 2024 (arXiv:2405.21060).
"""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

from cuattn.ops.linear.arguments import check
from cuattn.ops.linear.launch import forward
from cuattn.ops.linear.options import FeatureMap, LinearKeywords
from cuattn.ops.linear.state import LinearState
from cuattn.ops.linear.summary import summary_of
from cuattn.scalars import check_flag
from cuattn.typing import ArrayT

__all__ = ["linear_attention", "linear_attention_summary"]


@overload
def linear_attention(
    q: ArrayT, k: ArrayT, v: ArrayT, *, return_state: Literal[False] = ..., **keywords: Unpack[LinearKeywords]
) -> ArrayT: ...
@overload
def linear_attention(
    q: ArrayT, k: ArrayT, v: ArrayT, *, return_state: Literal[True], **keywords: Unpack[LinearKeywords]
) -> tuple[ArrayT, LinearState]: ...
@overload
def linear_attention(
    q: ArrayT, k: ArrayT, v: ArrayT, *, return_state: bool, **keywords: Unpack[LinearKeywords]
) -> ArrayT | tuple[ArrayT, LinearState]: ...
def linear_attention(
    q: Any,
    k: Any,
    v: Any,
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
    """Attention whose weights are products of features: a state of fixed size takes the place of all keys.

    With q and k mapped by the feature map, for each token t of each head::

        S_t = diag(e^g_t) S_{t-1} + k_t (x) v_t        z_t = diag(e^g_t) z_{t-1} + k_t
        o_t = scale q_t S_t                            or, with normalize, scale q_t S_t / (scale q_t z_t + eps)

    where g is the decay. The present token is included. Time grows with the number of tokens, not its square, and
    beside inputs and outputs there is one state a head.

    Parameters
    ----------
    q : array [B, N, H, D]; float16, bfloat16, float32 or float64
        Any strides; a last axis that is not contiguous is copied. D and E are at most 256.
    k : array [B, M, Gk, D], dtype of ``q``
    v : array [B, M, Gv, E], dtype of ``q``
        There are G = max(Gk, Gv) states, a multiple of both, and O = max(H, G) outputs, a multiple of H and G. Output
        o reads query head ``o // (O // H)`` and state ``o // (O // G)``; state g is made of key head ``g // (G // Gk)``
        and value head ``g // (G // Gv)``.
    causal : bool, default True
        Token t reads the state after key t, and M = N: earlier keys are in ``initial_state``. Otherwise every query
        reads the state after the last key, and M may be anything.
    feature_map : {"elu1", "relu", "square", None}, default "elu1"
        x + 1 for x > 0 and e^x else; max(x, 0); x squared; x itself.
    normalize : bool, default True
        Divide by scale q z + eps. Where that is 0, the result is 0.
    eps : float, default 0
    scale : float, optional
        Default: 1 with ``normalize``, else 1 / sqrt(D).
    decay : array [G], [B, N, G] or [B, N, G, D] of a float dtype, optional
        Logarithm of what is left of the state at each token, for a head, for a head and token, or for each channel of
        the key. Of any magnitude; -inf forgets the past exactly, as if the sequence began there. [G] may also be a list
        or lie on the host. A dtype other than that of the state is converted first.
    initial_state : LinearState, optional
        What an earlier call returned: its tokens precede these. Default: zeros.
    return_state : bool, default False
    chunk : {16, 32, 64, 128}, optional
        Tokens that are computed together. Checked, and without effect today: each kernel has one length of chunks.
    out : array [B, N, O, E], dtype of ``q``, optional
    state_out : LinearState, optional
        Where the state after the last token goes; it may be ``initial_state`` itself.

    Returns
    -------
    out : array [B, N, O, E], dtype of ``q``
    state : LinearState (s [B, G, D, E], z [B, G, D] or None), float32 (float64 for float64); only with ``return_state``

    Raises
    ------
    ArrayTypeError
        An argument is no array, or they are not all of one kind.
    DTypeError
        A dtype that is not allowed, or another than that of ``q``.
    ShapeError
        Ranks, head dims or extents that do not fit; head counts that are no multiples; N != M with ``causal``.
    ArgumentError
        An unknown feature map or chunk, a decay without ``causal``, an initial state without z where it is needed.
    NonFiniteError
        ``scale`` or ``eps`` is not finite, or a decay that the host can see holds NaN or +inf.
    OverlapError
        ``out`` or ``state_out`` overlaps an input (and is not the initial state), or the other.

    References
    ----------
    Katharopoulos et al., "Transformers are RNNs: fast autoregressive transformers with linear attention", 2020
    (arXiv:2006.16236).

    Examples
    --------
    A sequence in two parts:

    >>> import numpy as np
    >>> import cuattn
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 40, 2, 16)).astype(np.float32)
    >>> whole = cuattn.linear_attention(q, k, v)
    >>> first, state = cuattn.linear_attention(q[:, :30], k[:, :30], v[:, :30], return_state=True)
    >>> second = cuattn.linear_attention(q[:, 30:], k[:, 30:], v[:, 30:], initial_state=state)
    >>> bool(np.allclose(whole, np.concatenate([first, second], axis=1), atol=1e-5))
    True
    """
    wanted = check_flag("return_state", return_state)
    problem = check(
        q,
        k,
        v,
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
    result, state = forward(problem, need_state=wanted)
    return (result, state) if wanted else result


def linear_attention_summary(
    k: ArrayT,
    v: ArrayT,
    *,
    feature_map: FeatureMap | None = "elu1",
    normalize: bool = True,
    decay: Any = None,
) -> tuple[ArrayT, LinearState]:
    """What a segment of a sequence does to the state that it begins with: all that others need to know of it.

    After the segment the state is ``e^total * S_before + S_from_zero``, and z likewise. So summaries of neighbouring
    segments compose, in any grouping, into the summary of both: the decays add up, and
    ``S = e^total_b * S_a + S_b``.

    Parameters
    ----------
    k, v, feature_map, normalize, decay
        As for `linear_attention`.

    Returns
    -------
    total : array [B, G], or [B, G, D] for a decay of each channel; float32 (float64 for float64)
        The sum of the decays of all tokens; zeros without a decay.
    state : LinearState
        The state that the segment makes of zeros; z is None without ``normalize``.

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, ArgumentError, NonFiniteError
        As for `linear_attention`.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> k, v = np.ones((2, 1, 3, 1, 16), np.float32)
    >>> total, state = cuattn.linear_attention_summary(k, v, decay=[-1.0])
    >>> total.tolist(), state.s.shape
    ([[-3.0]], (1, 1, 16, 16))
    """
    problem = check(
        None, k, v, feature_map=feature_map, normalize=normalize, eps=0.0, scale=None, decay=decay, chunk=None
    )
    _, state = forward(problem, need_state=True)
    assert state is not None
    return summary_of(problem), state
