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
