"""Mistakes that a checker of types finds: each line that ends in ``# wrong``, and no other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import cuattn

Half = NDArray[np.float16]


def names() -> None:
    print(cuattn.no_such_function)  # wrong
    print(cuattn.atention)  # wrong


def attentions(q: Half, k: Half, v: Half) -> None:
    cuattn.attention(q, k)  # wrong
    cuattn.attention(q, k, v, causal="left")  # wrong
    cuattn.attention(q, k, v, window=5)  # wrong
    cuattn.attention(q, k, v, chunks=5)  # wrong
    cuattn.attention(q, k, v, True)  # wrong
    cuattn.attention(q, k, v, precision="fp16")  # wrong
    cuattn.attention_varlen(q, k, v)  # wrong
    cuattn.attention_varlen(q, k, v, [0, 1], [0, 1], softmax_scale=1.0)  # wrong
    cuattn.paged_attention(q, k, v, [[0]], [1], kv_format="fp8")  # wrong
    cuattn.paged_attention(q, k, v, [[0]], [1], bias=q)  # wrong
    out, lse = cuattn.decode_attention(q, k, v, [3], return_lse=True)
    cuattn.attention_backward(out, q, k, v, out, lse, deterministic="yes")  # wrong
    print(cuattn.attention_backward(out, q, k, v, out, lse).dx)  # wrong


def masks(q: Half) -> None:
    cuattn.strided_attention(q, q, q)  # wrong
    cuattn.strided_attention(q, q, q, 8, window=(3, 0))  # wrong
    cuattn.BlockMask.from_blocks([[1]], 64)  # wrong
    print(cuattn.BlockMask.from_dense([[1]]) & [[True]])  # wrong


def softmaxes(x: Half) -> None:
    cuattn.softmax(x, algorithm="fast")  # wrong
    cuattn.softmax(x, 0)  # wrong
    cuattn.softmax(x, axis="last")  # wrong
    total: float = cuattn.logsumexp(x)  # wrong
    print(total)


def rotations(x: Half) -> None:
    cuattn.rope(x)  # wrong
    cuattn.rope_frequencies(64, 4096, scaling="dynamic")  # wrong
    cuattn.split_qkv(x)  # wrong
