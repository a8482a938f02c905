"""The functions of the package with what users cannot choose: the shape of the kernel, and what the host knows.

Each takes the arguments of the function of its name in `cuattn`, checks them as that does, and returns or writes the
same. In addition,

* ``config``: a row of the family's table, or a shape of one's own; None: what a call would take;
* ``schedule_on_device``: as if only the device knew the lengths of a packed batch;
* ``look=False``: positions and slots that the host sees go unchecked, as those on a device do.

>>> import numpy as np
>>> from cuattn.ops.attention.forward.config import PlainFwdConfig
>>> from cuattn.testing import kernels
>>> q = np.ones((1, 4, 2, 32), np.float32)
>>> kernels.attention(q, q, q, config=PlainFwdConfig()).shape
(1, 4, 2, 32)
"""

from __future__ import annotations

from typing import Any

from cuattn.kv.append import write
from cuattn.kv.arguments import check as check_append
from cuattn.ops.attention import arguments as attention_arguments
from cuattn.ops.attention import varlen
from cuattn.ops.attention.backward import arguments as backward_arguments
from cuattn.ops.attention.backward.launch import backward
from cuattn.ops.attention.backward.problem import AttentionGrads
from cuattn.ops.attention.forward.config import FlashFwdConfig, PlainFwdConfig
from cuattn.ops.attention.forward.hopper_config import HopperFwdConfig
from cuattn.ops.attention.forward.launch import forward
from cuattn.ops.decode import arguments as decode_arguments
from cuattn.ops.decode.config import FlashDecodeConfig
from cuattn.ops.decode.launch import decode
from cuattn.ops.differential import arguments as differential_arguments
from cuattn.ops.differential.config import DifferentialConfig
from cuattn.ops.differential.hopper_config import HopperDifferentialConfig
from cuattn.ops.differential.launch import forward as differential_forward
from cuattn.ops.dual_chunk import arguments as dual_chunk_arguments
from cuattn.ops.dual_chunk.launch import forward as dual_chunk_forward
from cuattn.ops.rotary import rope_arguments, split_arguments
from cuattn.ops.rotary.arguments import Rotary
from cuattn.ops.rotary.rope_launch import rotate
from cuattn.ops.rotary.split_launch import split
from cuattn.ops.softmax import arguments as softmax_arguments
from cuattn.ops.softmax.config import SoftmaxConfig
from cuattn.ops.softmax.launch import compute
from cuattn.ops.sparse import dense as sparse_dense
from cuattn.ops.sparse import varlen as sparse_varlen
from cuattn.ops.sparse.launch import forward_tiles

__all__ = [
    "append_kv",
    "attention",
    "attention_backward",
    "attention_varlen",
    "attention_varlen_backward",
    "block_sparse_attention",
    "block_sparse_attention_varlen",
    "decode_attention",
    "differential_attention",
    "dual_chunk_attention",
    "log_softmax",
    "logsumexp",
    "paged_attention",
    "paged_attention_varlen",
    "rope",
    "softmax",
    "split_qkv",
]

ForwardConfig = FlashFwdConfig | PlainFwdConfig | HopperFwdConfig


def attention(
    q: Any, k: Any, v: Any, *, config: ForwardConfig | None = None, return_lse: bool = False, **options: Any
) -> Any:
    """Call `cuattn.attention` with a kernel shape of one's own choice."""
    problem = attention_arguments.check(q, k, v, may_be_unrounded=True, **options)
    return forward(problem, return_lse=return_lse, config=config)


def attention_varlen(
    *arrays: Any,
    config: ForwardConfig | None = None,
    schedule_on_device: bool = False,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """Call `cuattn.attention_varlen` with a kernel shape of one's own, or as if only the device knew the lengths."""
    problem, packed = varlen.check(*arrays, may_be_unrounded=True, **options)
    if schedule_on_device:
        packed.host = None
    return forward(problem, return_lse=return_lse, config=config, packed=packed)


def block_sparse_attention(
    q: Any,
    k: Any,
    v: Any,
    block_mask: Any,
    *,
    config: HopperFwdConfig | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """Call `cuattn.block_sparse_attention` with a shape of the Hopper kernel of one's own choice."""
    problem, masks = sparse_dense.check(q, k, v, block_mask, **options)
    return forward(problem, return_lse=return_lse, listed=forward_tiles(problem, masks, config=config))


def block_sparse_attention_varlen(
    *arrays: Any, config: HopperFwdConfig | None = None, return_lse: bool = False, **options: Any
) -> Any:
    """Call `cuattn.block_sparse_attention_varlen` likewise."""
    problem, packed, masks = sparse_varlen.check(*arrays, **options)
    return forward(
        problem, return_lse=return_lse, packed=packed, listed=forward_tiles(problem, masks, packed, config=config)
    )


def differential_attention(
    *arrays: Any,
    config: DifferentialConfig | HopperDifferentialConfig | None = None,
    return_state: bool = False,
    **options: Any,
) -> Any:
    """Call `cuattn.differential_attention` with a kernel shape of one's own choice."""
    return differential_forward(
        differential_arguments.check(*arrays, **options), return_state=return_state, config=config
    )


def dual_chunk_attention(
    *arrays: Any,
    config: FlashFwdConfig | None = None,
    schedule_on_device: bool = False,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """Call `cuattn.dual_chunk_attention` with a row of one's own, or as if only the device knew the lengths."""
    problem = dual_chunk_arguments.check(*arrays, **{**dual_chunk_arguments.DEFAULTS, **options})
    if schedule_on_device and problem.packed is not None:
        problem.packed.host = None
    return dual_chunk_forward(problem, return_lse=return_lse, config=config)


def attention_backward(*arrays: Any, configs: Any = None, **options: Any) -> AttentionGrads:
    """Call `cuattn.attention_backward` with kernel shapes of one's own: a config for each product, or None."""
    return backward(backward_arguments.check(*arrays, may_be_unrounded=True, **options), configs=configs)


def attention_varlen_backward(
    *arrays: Any, configs: Any = None, schedule_on_device: bool = False, **options: Any
) -> AttentionGrads:
    """Call `cuattn.attention_varlen_backward` with kernel shapes of one's own, or lengths that the device knows."""
    problem = backward_arguments.check_packed(*arrays, may_be_unrounded=True, **options)
    if schedule_on_device and problem.packed is not None:
        problem.packed.host = None
    return backward(problem, configs=configs)


def decode_attention(
    *arrays: Any, config: FlashDecodeConfig | None = None, return_lse: bool = False, **options: Any
) -> Any:
    """Call `cuattn.decode_attention` with a kernel shape of one's own choice."""
    problem = decode_arguments.check(*arrays, may_be_unrounded=True, **options)
    return decode(problem, return_lse=return_lse, config=config)


def paged_attention(
    *arrays: Any, config: FlashDecodeConfig | None = None, return_lse: bool = False, **options: Any
) -> Any:
    """Call `cuattn.paged_attention` with a kernel shape of one's own choice."""
    problem = decode_arguments.check_paged(*arrays, may_be_unrounded=True, **options)
    return decode(problem, return_lse=return_lse, config=config)


def paged_attention_varlen(
    *arrays: Any, config: FlashDecodeConfig | None = None, return_lse: bool = False, **options: Any
) -> Any:
    """Call `cuattn.paged_attention_varlen` with a kernel shape of one's own choice."""
    problem = decode_arguments.check_paged_varlen(*arrays, may_be_unrounded=True, **options)
    return decode(problem, return_lse=return_lse, config=config)


def softmax(
    x: Any, *, axis: int = -1, algorithm: str = "online", out: Any = None, config: SoftmaxConfig | None = None
) -> Any:
    """Call `cuattn.softmax` with a kernel shape of one's own choice."""
    return compute(softmax_arguments.check("softmax", x, axis=axis, algorithm=algorithm, out=out), config)


def log_softmax(
    x: Any, *, axis: int = -1, algorithm: str = "online", out: Any = None, config: SoftmaxConfig | None = None
) -> Any:
    """Call `cuattn.log_softmax` with a kernel shape of one's own choice."""
    return compute(softmax_arguments.check("log_softmax", x, axis=axis, algorithm=algorithm, out=out), config)


def logsumexp(
    x: Any,
    *,
    axis: int = -1,
    keepdims: bool = False,
    algorithm: str = "online",
    out: Any = None,
    config: SoftmaxConfig | None = None,
) -> Any:
    """Call `cuattn.logsumexp` with a kernel shape of one's own choice."""
    problem = softmax_arguments.check("logsumexp", x, axis=axis, algorithm=algorithm, out=out, keepdims=keepdims)
    return compute(problem, config)


def rope(x: Any, positions: Any, *, inverse: bool = False, out: Any = None, look: bool = True, **rotation: Any) -> Any:
    """Call `cuattn.rope`; without ``look``, positions that the host sees go unchecked, as a device's do."""
    rotary = Rotary(**rotation)
    return rotate(rope_arguments.check(x, positions, rotary, inverse=inverse, out=out, look=look))


def split_qkv(
    qkv: Any,
    bias: Any = None,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    rope: Rotary | None = None,
    positions: Any = None,
    cu_seqlens: Any = None,
    plan: Any = None,
    out: Any = None,
    look: bool = True,
) -> tuple[Any, Any, Any]:
    """Call `cuattn.split_qkv`; without ``look``, positions that the host sees go unchecked, as a device's do."""
    arguments = (qkv, bias, num_heads, num_kv_heads, rope, positions, cu_seqlens, plan, out)
    return split(split_arguments.check(*arguments, look=look))


def append_kv(*arrays: Any, look: bool = True, **options: Any) -> None:
    """Call `cuattn.append_kv`; without ``look``, slots and positions go unchecked, as a device's do."""
    write(check_append(*arrays, look=look, **options))
