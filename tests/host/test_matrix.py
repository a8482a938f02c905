"""Tensor-core instructions and matrix moves against NumPy: exact on integers, sums within an interval."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import cuattn.host as host

BF16 = np.dtype(ml_dtypes.bfloat16)

# shape, PTX types, element dtype, registers of D/C, A, B, elements a register
MMA = {
    "m16n8k16.f16": ("m16n8k16", "f32.f16.f16.f32", np.float16, 4, 4, 2, 16),
    "m16n8k8.f16": ("m16n8k8", "f32.f16.f16.f32", np.float16, 4, 2, 1, 8),
    "m16n8k16.bf16": ("m16n8k16", "f32.bf16.bf16.f32", BF16, 4, 4, 2, 16),
    "m16n8k8.bf16": ("m16n8k8", "f32.bf16.bf16.f32", BF16, 4, 2, 1, 8),
    "m16n8k8.tf32": ("m16n8k8", "f32.tf32.tf32.f32", np.float32, 4, 4, 2, 8),
    "m16n8k4.tf32": ("m16n8k4", "f32.tf32.tf32.f32", np.float32, 4, 2, 1, 4),
    "m16n8k16.f16acc": ("m16n8k16", "f16.f16.f16.f16", np.float16, 2, 4, 2, 16),
    "m16n8k8.f16acc": ("m16n8k8", "f16.f16.f16.f16", np.float16, 2, 2, 1, 8),
}


def kernel_for(shape: str, types: str, nd: int, na: int, nb: int) -> host.RawKernel:
    """d = a b + c with each lane's registers loaded from and stored to [32, registers] arrays."""
    f32 = types.startswith("f32")
    c, ctype = ("f", "float") if f32 else ("r", "unsigned")
    names = [f"%{i}" for i in range(2 * nd + na + nb)]
    groups = [names[:nd], names[nd : nd + na], names[nd + na : nd + na + nb], names[nd + na + nb :]]
    text = ", ".join("{" + ", ".join(g) + "}" for g in groups)
    outputs = ", ".join(f'"={c}"(d[{i}])' for i in range(nd))
    inputs = ", ".join(
        [f'"r"(a[lane * {na} + {i}])' for i in range(na)]
        + [f'"r"(b[lane * {nb} + {i}])' for i in range(nb)]
        + [f'"{c}"(c[lane * {nd} + {i}])' for i in range(nd)]
    )
    code = f"""
extern "C" __global__ void k(const unsigned* a, const unsigned* b, const {ctype}* c, {ctype}* out) {{
  int lane = threadIdx.x;
  {ctype} d[{nd}];
  asm volatile("mma.sync.aligned.{shape}.row.col.{types} {text};" : {outputs} : {inputs});
  for (int i = 0; i < {nd}; i++) out[lane * {nd} + i] = d[i];
}}
"""
    return host.RawModule(code=code).get_function("k")


def fragment_a(matrix: np.ndarray, registers: int, per: int) -> np.ndarray:
    """[16, k] → [32, registers] words, by the PTX ISA's figures; ``per`` elements a register."""
    lane = np.arange(32)
    words = np.zeros((32, registers, per), matrix.dtype)
    step = 4 * per  # columns that one register covers over the quad
    for register in range(registers):
        for e in range(per):
            row = lane // 4 + 8 * (register % 2)
            words[:, register, e] = matrix[row, step * (register // 2) + per * (lane % 4) + e]
    return words.reshape(32, -1).view(np.uint32).copy()


def fragment_b(matrix: np.ndarray, registers: int, per: int) -> np.ndarray:
    lane = np.arange(32)
    words = np.zeros((32, registers, per), matrix.dtype)
    for register in range(registers):
        for e in range(per):
            words[:, register, e] = matrix[4 * per * register + per * (lane % 4) + e, lane // 4]
    return words.reshape(32, -1).view(np.uint32).copy()


def fragment_c(matrix: np.ndarray) -> np.ndarray:
    """[16, 8] → [32, 4]."""
    lane = np.arange(32)
    return np.stack([matrix[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2] for i in range(4)], axis=1)


def run_mma(name: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    shape, types, dtype, nd, na, nb, _ = MMA[name]
    per = 4 // np.dtype(dtype).itemsize
    fa, fb, fc = fragment_a(a.astype(dtype), na, per), fragment_b(b.astype(dtype), nb, per), fragment_c(c)
    if nd == 2:
        fc = np.ascontiguousarray(fc.astype(np.float16)).view(np.uint32)
    out = np.zeros((32, nd), fc.dtype)
    with host.check("all"):
        kernel_for(shape, types, nd, na, nb)((1,), (32,), (fa, fb, np.ascontiguousarray(fc), out))
    lanes = out.view(np.float16).astype(np.float32) if nd == 2 else out
    result = np.zeros((16, 8), np.float32)
    lane = np.arange(32)
    for i in range(4):
        result[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2] = lanes[:, i]
    return result


@pytest.mark.parametrize("name", MMA)
def test_mma_is_exact_on_small_integers(name):
    rng = np.random.default_rng(0)
    k = MMA[name][-1]
    a, b = rng.integers(-8, 9, (16, k)).astype(np.float32), rng.integers(-8, 9, (k, 8)).astype(np.float32)
    c = rng.integers(-50, 51, (16, 8)).astype(np.float32)
    assert (run_mma(name, a, b, c) == a @ b + c).all()


@pytest.mark.parametrize("name", MMA)
def test_mma_sums_within_the_interval(name):
    rng = np.random.default_rng(1)
    _, _, dtype, nd, _, _, k = MMA[name]
    a, b = rng.standard_normal((16, k)).astype(dtype), rng.standard_normal((k, 8)).astype(dtype)
    c = rng.standard_normal((16, 8)).astype(np.float16 if nd == 2 else np.float32)
    a64, b64, c64 = a.astype(np.float64), b.astype(np.float64), c.astype(np.float64)
    if "tf32" in name:
        a64, b64 = (x.astype(np.float32).view(np.uint32) & 0xFFFFE000 for x in (a, b))
        a64, b64 = a64.view(np.float32).astype(np.float64), b64.view(np.float32).astype(np.float64)
    exact = a64 @ b64 + c64
    magnitude = np.abs(a64) @ np.abs(b64) + np.abs(c64)
    bound = (k + 1) * 2.0**-23 * magnitude + (2.0**-11 * np.abs(exact) + 2.0**-25 if nd == 2 else 0)
    assert (np.abs(run_mma(name, a, b, c) - exact) <= bound).all()


def test_mma_infinities_and_nan():
    a, b, c = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8), np.float32)
    a[0, 0], b[0, 0], b[0, 1] = np.inf, 1, 0
    c[5, 5] = -np.inf
    out = run_mma("m16n8k16.f16", a, b, c)
    assert out[0, 0] == np.inf and np.isnan(out[0, 1]) and out[5, 5] == -np.inf
    assert out.view(np.uint32)[0, 1] == 0x7FFFFFFF  # the canonical NaN


def test_mma_f64():
    code = """
extern "C" __global__ void k(const double* a, const double* b, const double* c, double* out) {
  int t = threadIdx.x; double d0, d1;
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%4, %5};"
      : "=d"(d0), "=d"(d1) : "d"(a[t]), "d"(b[t]), "d"(c[2 * t]), "d"(c[2 * t + 1]));
  out[2 * t] = d0; out[2 * t + 1] = d1;
}
"""
    rng = np.random.default_rng(2)
    a, b, c = rng.standard_normal((8, 4)), rng.standard_normal((4, 8)), rng.standard_normal((8, 8))
    out = np.zeros((8, 8))
    with host.check("all"):
        host.RawModule(code=code).get_function("k")((1,), (32,), (a, np.ascontiguousarray(b.T), c, out))
    assert np.abs(out - (a @ b + c)).max() < 1e-14


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, trans):
    outs = ", ".join(f"%{i}" for i in range(count))
    code = f"""
extern "C" __global__ void k(const uint4* rows, unsigned* out) {{
  __shared__ uint4 s[32];
  s[threadIdx.x] = rows[threadIdx.x];
  __syncwarp();
  unsigned r[{count}];
  unsigned at = (unsigned)__cvta_generic_to_shared(&s[threadIdx.x]);
  asm volatile("ldmatrix.sync.aligned.m8n8.x{count}{".trans" if trans else ""}.shared.b16 {{{outs}}}, [%{count}];"
               : {", ".join(f'"=r"(r[{i}])' for i in range(count))} : "r"(at));
  for (int i = 0; i < {count}; i++) out[threadIdx.x * {count} + i] = r[i];
}}
"""
    rows = host.empty((32, 8), np.uint16)
    rows[:] = np.arange(256).reshape(32, 8)
    host.finish(rows)
    out = np.zeros((32, count), np.uint32)
    with host.check("all"):
        host.RawModule(code=code).get_function("k")((1,), (32,), (rows, out))
    lane = np.arange(32)
    for m in range(count):
        matrix = rows[8 * m : 8 * m + 8]
        matrix = matrix.T if trans else matrix
        pairs = np.stack([matrix[lane // 4, 2 * (lane % 4)], matrix[lane // 4, 2 * (lane % 4) + 1]], axis=1)
        assert (out[:, m] == np.ascontiguousarray(pairs).view(np.uint32)[:, 0]).all()
