"""Where the decode functions are to write to: `out` and `workspace`, and what may lie in the memory of what."""

from __future__ import annotations

import numpy as np
import pytest
from decode_calls import FUNCTIONS, call, quantized, refused

from cuattn.errors import ArgumentError, ArrayTypeError, DTypeError, OverlapError, ShapeError

VARLEN = FUNCTIONS[2]

pytestmark = pytest.mark.usefixtures("nothing_is_launched")


def result_shape(function):
    return (6, 4, 16) if function is VARLEN else (3, 2, 4, 16)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_out(function):
    shape = result_shape(function)
    refused(function, ShapeError, "out has shape", out=np.zeros((*shape[:-1], 32), np.float32))
    refused(
        function, DTypeError, "out has dtype float16; the result has dtype float32", out=np.zeros(shape, np.float16)
    )
    read_only = np.zeros(shape, np.float32)
    read_only.flags.writeable = False
    refused(function, ArrayTypeError, "out is read-only", out=read_only)
    shared = np.lib.stride_tricks.as_strided(np.zeros(shape, np.float32), shape, (4,) * len(shape))
    refused(function, OverlapError, "out has strides", out=shared)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_outputs_that_lie_in_an_input(function):
    """Every array of the call in turn lies in the memory of ``out``, and of ``workspace``."""
    arguments = call(function) | {"alibi_slopes": np.ones(4, np.float32), "sinks": np.ones(4, np.float32)}
    for name, x in arguments.items():
        memory = np.zeros(64 * 1024, np.uint8)
        inside = memory[1024 : 1024 + x.nbytes].view(x.dtype).reshape(x.shape)
        inside[...] = x
        out = memory[: 4 * np.prod(result_shape(function))].view(np.float32).reshape(result_shape(function))
        if out.nbytes <= 1024:
            out = memory[1024 : 1024 + out.nbytes].view(np.float32).reshape(out.shape)
        given = arguments | {name: inside}
        refused(function, OverlapError, f"out lies in the memory range of {name}", given, out=out)
        refused(function, OverlapError, f"workspace lies in the memory range of {name}", given, workspace=memory)
    out = np.zeros(result_shape(function), np.float32)
    workspace = out.reshape(-1).view(np.uint8)
    refused(function, OverlapError, "workspace lies in the memory range of out", out=out, workspace=workspace)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", ("k_scale", "v_scale"))
def test_outputs_that_lie_in_scales(function, name):
    arguments = quantized(function, "int8")
    scales = np.ones(16 * 1024, np.float32)
    slots = next(x for key, x in arguments.items() if key.startswith("k_")).shape[:3]
    arguments[name] = scales[: np.prod(slots)].reshape(slots)
    out = scales[: np.prod(result_shape(function))].reshape(result_shape(function))
    refused(function, OverlapError, f"out lies in the memory range of {name}", arguments, out=out)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_workspace(function):
    good = np.zeros(1 << 16, np.uint8)
    at = good.ctypes.data % 16
    refused(function, ShapeError, "workspace has shape", workspace=good.reshape(2, -1))
    refused(function, DTypeError, "workspace has dtype float32", workspace=good.view(np.float32))
    refused(function, ArgumentError, "workspace has strides", workspace=good[::2])
    refused(function, ArgumentError, "workspace begins at address", workspace=good[1 if at == 0 else 16 - at + 1 :])
    read_only = good.copy()
    read_only.flags.writeable = False
    refused(function, ArrayTypeError, "workspace is read-only", workspace=read_only)
    out = np.full(result_shape(function), 7, np.float32)
    # 6 tokens, 4 splits, 4 heads, 16 numbers, a maximum and a sum each
    few = np.zeros(6 * 4 * 4 * 18 * 4 - 1, np.uint8)
    message = f"workspace has {few.size} bytes; {few.size + 1} are needed"
    refused(function, ShapeError, message, workspace=few, out=out, num_splits=4)
