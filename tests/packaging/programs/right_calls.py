"""What a user writes, and the types that it has: read by checkers of types, never run."""

from __future__ import annotations

from typing import TypeAlias, assert_type

import numpy as np
from numpy.typing import NDArray

import cuattn

Half: TypeAlias = NDArray[np.float16]
Single: TypeAlias = NDArray[np.float32]


class Tensor:
    """An array type that cuattn has never heard of."""


def attentions(q: Half, k: Half, v: Half, t: Tensor, flag: bool, starts: NDArray[np.int32]) -> None:
    assert_type(cuattn.attention(q, k, v), Half)
    assert_type(cuattn.attention(t, t, t, causal="top_left", window=(128, None), chunk=512), Tensor)
    assert_type(cuattn.attention(q, k, v, return_lse=True), tuple[Half, Half])
    assert_type(cuattn.attention(q, k, v, return_lse=flag), Half | tuple[Half, Half])
    assert_type(cuattn.attention_varlen(q, k, v, starts, starts, causal=True, max_seqlen_q=7), Half)
    assert_type(cuattn.standard_attention(q, k, v, softcap=30.0), Half)
    out, lse = cuattn.attention(q, k, v, precision="tf32", fp8_format=None, return_lse=True)
    grads = cuattn.attention_backward(out, q, k, v, out, lse, causal=True, deterministic=False)
    assert_type(grads, cuattn.AttentionGrads[Half])
    assert_type(grads.dq, Half)
    dq, dk, dv, _, _ = cuattn.attention_varlen_backward(out, q, k, v, out, lse, starts, starts, dropout_p=0.1)
    assert_type((dq, dk, dv), tuple[Half, Half, Half])


def decoding(q: Half, cache: NDArray[np.int8], tables: list[list[int]], lengths: list[int]) -> None:
    assert_type(cuattn.decode_attention(q, q, q, lengths), Half)
    assert_type(cuattn.paged_attention(q, cache, cache, tables, lengths, kv_format="int8", k_scale=0.1), Half)
    out, lse = cuattn.paged_attention_varlen(q, q, q, tables, [0, 3], lengths, max_seqlen_q=3, return_lse=True)
    assert_type(out, Half)
    assert_type(lse, Half)
    assert_type(cuattn.cascade_attention(q, q, q, [], tables, lengths), Half)


def masks(q: Half, t: Tensor, flag: bool, grid: NDArray[np.bool_]) -> None:
    mask = cuattn.BlockMask.from_blocks(grid, 256, 512, block_size=(64, 128))
    assert_type((mask & ~mask | mask.T).todense(), NDArray[np.bool_])
    assert_type(cuattn.bigbird_mask(4, 4, seed=1, causal=True), NDArray[np.bool_])
    assert_type(cuattn.strided_attention(q, q, q, 8), Half)
    assert_type(cuattn.strided_attention(t, t, t, 8, local=32, return_lse=True), tuple[Tensor, Tensor])
    assert_type(cuattn.strided_attention(q, q, q, 8, causal=False, return_lse=flag), Half | tuple[Half, Half])
    assert_type(cuattn.strided_attention_backward(q, q, q, q, q, q, 8).dk, Half)


def softmaxes(x: Single, t: Tensor) -> None:
    assert_type(cuattn.softmax(x), Single)
    assert_type(cuattn.log_softmax(x, axis=0, algorithm="safe"), Single)
    assert_type(cuattn.logsumexp(t, keepdims=True), Tensor)


def rotations(x: Half, positions: list[int]) -> None:
    assert_type(cuattn.rope(x, positions, interleaved=True), Half)
    q, k, v = cuattn.split_qkv(x, num_heads=4, num_kv_heads=2)
    assert_type(q, Half)
    assert_type(k, Half)
    assert_type(v, Half)
    cuattn.rope_frequencies(64, 4096, scaling="yarn", factor=4.0)


def padded(x: Half, mask: NDArray[np.bool_]) -> None:
    plan = cuattn.padding_plan(mask)
    packed = cuattn.remove_padding(x, plan)
    assert_type(packed, Half)
    assert_type(cuattn.restore_padding(packed, plan), Half)


def merged(out: Half, lse: Single) -> None:
    assert_type(cuattn.merge_states(out, lse, out, lse), tuple[Half, Single])
