"""Tensors of PyTorch on the CPU in, tensors out: what other projects' tests need to call functions of arrays.

`on_cpu` makes their ``device="cuda"`` mean the CPU, where the host executor runs the same kernels.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from cuattn.errors import CuattnError

_NARROW = {
    "bfloat16": (np.int16, torch.bfloat16),
    "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn),
    "float8_e5m2": (np.uint8, torch.float8_e5m2),
}
HUGE = 2**32  # elements: a tensor that only fills the memory of a GPU


def array(x):
    """What a function of arrays takes in the place of ``x``; the same memory."""
    return x.detach() if isinstance(x, torch.Tensor) else x


def tensor(x):
    """The tensor over the memory of an array."""
    if not isinstance(x, np.ndarray):
        return x
    bits, dtype = _NARROW.get(x.dtype.name, (None, None))
    return torch.from_numpy(x) if bits is None else torch.from_numpy(x.view(bits)).view(dtype)


def dtype_name(dtype):
    """The name of a dtype of PyTorch, as NumPy knows it."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def adapted(function):
    """``function`` of arrays as one of tensors, without gradients; typed errors become what PyTorch raises."""

    def call(*args, **kwargs):
        try:
            result = function(*map(array, args), **{name: array(x) for name, x in kwargs.items()})
        except CuattnError as error:
            raise RuntimeError(str(error)) from error
        return tuple(map(tensor, result)) if isinstance(result, tuple) else tensor(result)

    return call


class Differentiable(torch.autograd.Function):
    """A function of arrays with the function of its gradients: forward(*arrays) gives (out, lse)."""

    @staticmethod
    def forward(ctx, forward, backward, *tensors):
        out, lse = adapted(forward)(*tensors)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.gradients = backward
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, _):
        *tensors, out, lse = ctx.saved_tensors
        gradients = adapted(ctx.gradients)(dout, *tensors, out, lse)
        return None, None, *(gradients if isinstance(gradients, tuple) else (gradients,))


class _OnCpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = "cpu"
            if func is torch.empty and isinstance(args[0], int) and args[0] > HUGE:
                args = (0,)
        return func(*args, **kwargs)


@contextmanager
def on_cpu():
    """A context in which tensors of the first GPU are made on the CPU, and a GPU seems to be a Hopper."""
    properties = SimpleNamespace(total_memory=2**40, multi_processor_count=132)
    with ExitStack() as stack:
        for name, value in (("get_device_capability", (9, 0)), ("get_device_properties", properties)):
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, value=value: value))
        stack.enter_context(_OnCpu())
        yield
