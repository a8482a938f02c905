"""Which kernel a call takes, and why: the question for every family that has more than one."""

from __future__ import annotations

from typing import Any

from cuattn.errors import ArgumentError
from cuattn.messages import shown
from cuattn.ops.attention.forward.path import ForwardPath, attention_path
from cuattn.ops.differential.path import differential_path

__all__ = ["ForwardPath", "forward_path"]


def forward_path(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    *,
    arch: str | None = None,
    block_mask: Any = None,
    lambda_: Any = None,
    **options: Any,
) -> ForwardPath:
    """Say which kernel a call of attention takes for arguments, and why; nothing runs.

    The call is one of `cuattn.attention` or `cuattn.attention_varlen`, or of `cuattn.block_sparse_attention` with a
    ``block_mask``, or of `cuattn.differential_attention` with a ``lambda_``.

    On compute capability 9.0, calls take the Hopper kernel unless one of these holds: the dtype is neither float16 nor
    bfloat16, nor float8_e4m3fn with ``precision="fp8"``; a head dim is more than 256; there is a bias, a mask or
    dropout; the base or a stride of q, k or v is no multiple of 16 bytes, or a stride of an axis longer than 1 is not
    positive or reaches 2^40 bytes; there is nothing to compute; ``CUATTN_HOPPER=off``; of
    `cuattn.block_sparse_attention`, the keys of a block are no multiple of 8, or its queries no whole tiles of 64 rows,
    of one head or of several that share keys and the mask. Those, and calls on other architectures, take the portable
    kernels. For differential attention the same holds, and head dims of q and k up to 128 are taken. The result is
    right either way.

    Parameters
    ----------
    q, k, v : arrays
        As for `cuattn.attention`, or for `cuattn.attention_varlen` with ``cu_seqlens_q`` and ``cu_seqlens_k``.
    cu_seqlens_q, cu_seqlens_k : int32 [batch + 1], optional
        Both or none.
    arch : str, optional
        Ask for another architecture, such as "sm_90a", instead of that of the device of ``q`` (for NumPy arrays
        ``CUATTN_HOST_ARCH``). What `cuattn.tune` has measured counts only without it.
    block_mask : BlockMask, optional
        Ask for `cuattn.block_sparse_attention` with this mask.
    lambda_ : float or array, optional
        Ask for `cuattn.differential_attention` with this lambda. ``q`` has a head for each of its streams then.
    **options
        Keywords of those functions but ``return_lse`` and ``return_state``, which decide nothing.

    Returns
    -------
    ForwardPath

    Raises
    ------
    ArgumentError
        Only one of ``cu_seqlens_q`` and ``cu_seqlens_k`` is given, ``arch`` is not known, or there are lengths beside a
        ``block_mask``, or it is none, or one of them beside a ``lambda_``.
    NotSupportedError
        ``arch`` is older than sm_80.
    ArrayTypeError, DTypeError, ShapeError, NonFiniteError, OverlapError
        As for these functions.

    Examples
    --------
    >>> import numpy as np
    >>> import cuattn
    >>> q = np.zeros((1, 4096, 16, 128), np.float16)
    >>> cuattn.forward_path(q, q, q, arch="sm_90a").kernel
    'attention_forward_hopper'
    >>> path = cuattn.forward_path(q, q, q, dropout_p=0.1, arch="sm_90a")
    >>> path.kernel, path.reason
    ('attention_forward', 'not the Hopper kernel: the call has dropout')
    >>> cuattn.forward_path(q, q, q[:, :, ::2], lambda_=0.5, arch="sm_90a").kernel
    'differential_attention_hopper'
    """
    if lambda_ is None:
        given = {"arch": arch, "block_mask": block_mask, **options}
        return attention_path(q, k, v, cu_seqlens_q, cu_seqlens_k, **given)
    for name, value in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k), ("block_mask", block_mask)):
        if value is not None:
            raise ArgumentError(f"{name} is {shown(value)} beside lambda_; differential attention takes None")
    return differential_path(q, k, v, lambda_, arch=arch, **options)
