"""Mistakes that a checker of types finds: each line that ends in ``# wrong``, and no other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import cuattn

Half = NDArray[np.float16]


def names() -> None:
    print(cuattn.no_such_function)  # wrong
    print(cuattn.atention)  # wrong


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
