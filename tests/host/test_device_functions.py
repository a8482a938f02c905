"""CUDA's own math functions, compiled by NVRTC, against NumPy: arithmetic instructions in the company they keep.

The bounds are those of the CUDA programming guide, a little relaxed; a wrong instruction is off by far more.
"""

from __future__ import annotations

import math
import re

import ml_dtypes
import numpy as np
import pytest

import cuattn.host as host

N = 256
HEADERS = "#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n"


def evaluate(cases, c_type, inputs, result_dtype):
    """Run ``z[i] = expression(x[i], y[i])`` for every expression; returns name → array."""
    kernels = [
        f'extern "C" __global__ void k{k}(const {c_type}* x, const {c_type}* y, {c_type}* z) {{\n'
        f"  int i = threadIdx.x; {c_type} a = x[i], b = y[i]; z[i] = {expression}; }}\n"
        for k, expression in enumerate(cases)
    ]
    module = host.RawModule(code=HEADERS + "".join(kernels), options=("-w",), arch="sm_80")
    results = {}
    for k, expression in enumerate(cases):
        z = np.zeros(N, result_dtype)
        module.get_function(f"k{k}")((1,), (N,), (*inputs, z))
        results[expression] = z
    return results


def vectorized(function):
    return np.vectorize(function, otypes=[np.float64])


UNIT, POSITIVE, WIDE = "unit", "positive", "wide"
# expression → (NumPy on float64, operands, bound in float32 ulp)
FLOAT = {
    "expf(a)": (np.exp, WIDE, 3),
    "exp2f(a)": (np.exp2, WIDE, 3),
    "exp10f(a)": (lambda a: np.power(10.0, a), WIDE, 3),
    "expm1f(a)": (np.expm1, WIDE, 3),
    "logf(a)": (np.log, POSITIVE, 3),
    "log2f(a)": (np.log2, POSITIVE, 3),
    "log1pf(a)": (np.log1p, POSITIVE, 3),
    "sinf(a)": (np.sin, WIDE, 3),
    "cosf(a)": (np.cos, WIDE, 3),
    "sinf(a * 1e6f)": (lambda a: np.sin((a.astype(np.float32) * np.float32(1e6)).astype(np.float64)), WIDE, 3),
    "tanf(a)": (np.tan, UNIT, 5),
    "asinf(a)": (np.arcsin, UNIT, 4),
    "acosf(a)": (np.arccos, UNIT, 4),
    "atanf(a)": (np.arctan, WIDE, 3),
    "tanhf(a)": (np.tanh, WIDE, 3),
    "sinhf(a)": (np.sinh, WIDE, 4),
    "erff(a)": (vectorized(math.erf), WIDE, 3),
    "erfcf(a)": (vectorized(math.erfc), UNIT, 5),
    "sqrtf(a)": (np.sqrt, POSITIVE, 0.5),
    "rsqrtf(a)": (lambda a: 1 / np.sqrt(a), POSITIVE, 2),
    "cbrtf(a)": (np.cbrt, WIDE, 2),
    "lgammaf(a)": (vectorized(math.lgamma), POSITIVE, 8),
    "rintf(a)": (np.rint, WIDE, 0),
    "roundf(a)": (lambda a: np.trunc(a + np.copysign(0.5, a)), WIDE, 0),
    "floorf(a)": (np.floor, WIDE, 0),
    "truncf(a)": (np.trunc, WIDE, 0),
    "powf(a, 0.5f * b)": (lambda a, b: np.power(a, 0.5 * b), POSITIVE, 8),
    "fmodf(a, b)": (np.fmod, WIDE, 0),
    "hypotf(a, b)": (np.hypot, WIDE, 3),
    "atan2f(a, b)": (np.arctan2, WIDE, 4),
    "a / b": (np.divide, WIDE, 0.5),
    "__fdividef(a, b)": (np.divide, WIDE, 2),
    "copysignf(a, b)": (np.copysign, WIDE, 0),
    "fmaxf(a, b)": (np.fmax, WIDE, 0),
    "(float)(int)a": (np.trunc, WIDE, 0),
    "(float)(long long)(a * 1e12f)": (lambda a: np.trunc(a.astype(np.float32) * np.float32(1e12)), WIDE, 0.5),
}
DOUBLE = {
    "exp(a)": (np.exp, WIDE),
    "log(a)": (np.log, POSITIVE),
    "log2(a)": (np.log2, POSITIVE),
    "expm1(a)": (np.expm1, WIDE),
    "tanh(a)": (np.tanh, WIDE),
    "asin(a)": (np.arcsin, UNIT),
    "sqrt(a)": (np.sqrt, POSITIVE),
    "rsqrt(a)": (lambda a: 1 / np.sqrt(a), POSITIVE),
    "cbrt(a)": (np.cbrt, WIDE),
    "erf(a)": (vectorized(math.erf), WIDE),
    "floor(a)": (np.floor, WIDE),
    "rint(a)": (np.rint, WIDE),
    "a / b": (np.divide, WIDE),
    "hypot(a, b)": (np.hypot, WIDE),
    "fma(a, b, a)": (lambda a, b: a * b + a, POSITIVE),
    "(double)(long long)(a * 1e15)": (lambda a: np.trunc(a * 1e15), WIDE),
}
HALF = {
    "hexp(a)": np.exp,
    "hexp2(a)": np.exp2,
    "hlog(a)": np.log,
    "hsqrt(a)": np.sqrt,
    "hrcp(a)": np.reciprocal,
    "hrsqrt(a)": lambda a: 1 / np.sqrt(a),
    "hsin(a)": np.sin,
    "hcos(a)": np.cos,
    "hfloor(a)": np.floor,
    "hrint(a)": np.rint,
    "a + b": np.add,
    "a * b": np.multiply,
    "a / b": np.divide,
    "__hmax(a, b)": np.maximum,
    "(a < b ? a : b)": np.minimum,
    "__hfma(a, b, a)": lambda a, b: a * b + a,
}


def operands(kind, dtype):
    generator = np.random.default_rng(3)
    low, high = {UNIT: (-0.99, 0.99), POSITIVE: (1e-3, 30.0), WIDE: (-20.0, 20.0)}[kind]
    return tuple(generator.uniform(low, high, N).astype(dtype) for _ in range(2))


def reference(function, expression, inputs):
    wide = [x.astype(np.float64) for x in inputs]
    return function(*wide) if re.search(r"\bb\b", expression) else function(wide[0])


@pytest.mark.parametrize("kind", [UNIT, POSITIVE, WIDE])
def test_float_functions(kind):
    cases = {text: row for text, row in FLOAT.items() if row[1] == kind}
    inputs = operands(kind, np.float32)
    for text, z in evaluate(cases, "float", inputs, np.float32).items():
        expected = reference(cases[text][0], text, inputs)
        error = np.abs(z - expected) / np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
        assert error.max() <= cases[text][2], f"{text}: {error.max():.2f} ulp at {inputs[0][error.argmax()]}"


@pytest.mark.parametrize("kind", [UNIT, POSITIVE, WIDE])
def test_double_functions(kind):
    cases = {text: row for text, row in DOUBLE.items() if row[1] == kind}
    inputs = operands(kind, np.float64)
    for text, z in evaluate(cases, "double", inputs, np.float64).items():
        np.testing.assert_allclose(z, reference(cases[text][0], text, inputs), rtol=4e-15, err_msg=text)


@pytest.mark.parametrize(("c_type", "dtype"), [("__half", np.float16), ("__nv_bfloat16", ml_dtypes.bfloat16)])
def test_half_functions(c_type, dtype):
    inputs = operands(POSITIVE, np.float32)
    inputs = tuple((x / 4).astype(dtype) for x in inputs)
    for text, z in evaluate(HALF, c_type, inputs, dtype).items():
        expected = reference(HALF[text], text, inputs)
        # 2 ulp: the headers add one where a GPU's lg2 and ex2 are known to fall on the wrong side; the host's do not.
        bound = 2 * float(ml_dtypes.finfo(dtype).eps) * np.abs(expected) + 1e-7
        rounded = np.abs(z.astype(np.float64) - expected) <= bound
        assert rounded.all(), f"{text} at {inputs[0][~rounded][0]}"
