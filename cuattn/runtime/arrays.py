"""Operations on whole arrays, on the device of an executor."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from cuattn.allocation import allocating
from cuattn.runtime.device_copies import copied
from cuattn.runtime.executor import Executor

__all__ = ["assign", "contiguous", "full", "module_of", "zeros"]


def contiguous(executor: Executor, x: Any) -> Any:
    """Return ``x``, or a copy of it, in C order and aligned."""
    if isinstance(x, np.ndarray):
        return np.require(x, requirements=["C", "A"])
    if x.flags.c_contiguous:
        return x
    with executor.on_device():
        return copied(x)


def full(executor: Executor, shape: tuple[int, ...], value: float, dtype: Any) -> Any:
    """Make an array of ``value``, ordinary from the start."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    with executor.on_device(), allocating(f"an array of shape {list(shape)}", nbytes if executor.name == "host" else 0):
        return executor.xp.full(shape, value, dtype)


def assign(executor: Executor, target: Any, value: Any) -> None:
    """Assign, ``target[...] = value``, on the device of the executor."""
    with executor.on_device():
        target[...] = value


def zeros(executor: Executor, shape: tuple[int, ...], dtype: Any) -> Any:
    """Make an array of zeros, ordinary from the start."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    with executor.on_device(), allocating(f"an array of shape {list(shape)}", nbytes if executor.name == "host" else 0):
        return executor.xp.zeros(shape, dtype)


def module_of(*arrays: Any) -> Any:
    """The module that computes with these arrays: `numpy` if all of them are its own, else `cupy`. None counts not."""
    return np if all(x is None or isinstance(x, np.ndarray) for x in arrays) else sys.modules["cupy"]
