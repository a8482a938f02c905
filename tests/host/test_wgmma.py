"""wgmma against NumPy: exact on small integers, for every swizzle, major order, type and shape."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from wgmma_products import (
    SMEM,
    SWIZZLES,
    TYPES,
    Layout,
    Product,
    exact,
    integers,
    lay_out,
    matrix_of,
    operands,
    run,
    standard_layouts,
)

import cuattn.host as host
from cuattn.host import library


@pytest.mark.parametrize("majors", list(itertools.product((False, True), repeat=2)), ids=str)
@pytest.mark.parametrize("swizzles", list(itertools.product(SWIZZLES, repeat=2)), ids="-".join)
def test_every_swizzle_and_major(swizzles, majors):
    product = Product(n=72, a_mn=majors[0], b_mn=majors[1])
    a, b, d = operands(product)
    for gap in (0, 1):
        got = run(product, a, b, d, standard_layouts(product, swizzles, gap))
        np.testing.assert_array_equal(got, exact(product, a, b, d))


@pytest.mark.parametrize("swizzle", ["128B", "64B", "32B"])
@pytest.mark.parametrize("b_mn", [False, True])
def test_a_pattern_that_does_not_start_on_its_boundary_needs_the_base_offset(swizzle, b_mn):
    product = Product(n=72, b_mn=b_mn)
    a, b, d = operands(product)
    left, right = standard_layouts(product, ("128B", swizzle))
    span = {"128B": 1024, "64B": 512, "32B": 256}[swizzle]
    for shift in range(128, span, 128):
        moved = Layout(swizzle, b_mn, right.start + shift, right.leading, right.stride, shift >> 7)
        np.testing.assert_array_equal(run(product, a, b, d, (left, moved)), exact(product, a, b, d))
    if span > 128:  # the base offset is what makes it right
        wrong = run(product, a, b, d, (left, moved), forget_base_offset=True)
        assert not np.array_equal(wrong, exact(product, a, b, d))


def test_steps_of_k_inside_a_swizzled_tile():
    """As TMA lays a tile out: 64 columns in 128 bytes, 16-byte chunk c of row r in place c ^ r % 8."""
    product = Product(n=72)
    rng = np.random.default_rng(3)
    a, b = integers(rng, (64, 64), "bf16"), integers(rng, (72, 64), "bf16")
    image = np.full(SMEM, 0xFF, np.uint8)
    for matrix, start in ((a, 0), (b, 32 * 1024)):
        for row, chunk in itertools.product(range(len(matrix)), range(8)):
            place = start + row * 128 + (chunk ^ row % 8) * 16
            image[place : place + 16] = np.ascontiguousarray(matrix[row, 8 * chunk : 8 * chunk + 8]).view(np.uint8)
    d = np.zeros((64, 72), np.float32)
    for step in range(4):
        layouts = tuple(Layout("128B", False, start + 32 * step, 16, 1024) for start in (0, 32 * 1024))
        columns = slice(16 * step, 16 * step + 16)
        got = run(product, None, None, d, layouts, image=image)
        np.testing.assert_array_equal(got, exact(product, a[:, columns], b[:, columns], d))


# ---- types

PAIRS = [
    ("f16", "f16", "f32"), ("f16", "f16", "f16"), ("bf16", "bf16", "f32"), ("tf32", "tf32", "f32"),
    *((a, b, d) for a, b in itertools.product(("e4m3", "e5m2"), repeat=2) for d in ("f32", "f16")),
    *((a, b, "s32") for a, b in itertools.product(("s8", "u8"), repeat=2)),
]  # fmt: skip


@pytest.mark.parametrize("registers", [False, True], ids=["memory", "registers"])
@pytest.mark.parametrize("types", PAIRS, ids="-".join)
def test_every_type(types, registers):
    a_type, b_type, d_type = types
    product = Product(a=a_type, b=b_type, d=d_type, n=48, registers=registers)
    a, b, d = operands(product)
    for swizzle in SWIZZLES:
        got = run(product, a, b, d, standard_layouts(product, (swizzle, swizzle)))
        np.testing.assert_array_equal(got, exact(product, a, b, d))
    if not registers and d_type != "s32":
        negative = Product(a=a_type, b=b_type, d=d_type, n=48, scale=(-1, 1))
        got = run(negative, a, b, d, standard_layouts(negative))
        np.testing.assert_array_equal(got, exact(negative, a, b, d))


@pytest.mark.parametrize("b_mn", [False, True])
def test_16_bit_values_of_every_exponent(b_mn):
    """One product a sum: exact, whatever the bits; infinities and NaNs as IEEE says."""
    for name, dtype in (("f16", TYPES["f16"]), ("bf16", TYPES["bf16"])):
        product = Product(a=name, b=name, n=256, b_mn=b_mn)
        a = np.eye(64, 16).astype(dtype)
        codes = np.arange(0, 65536, 16, dtype=np.uint16).reshape(256, 16)
        codes[:, 8:] |= 0xF
        b = codes.view(dtype)
        finite = np.where(np.isfinite(b.astype(np.float32)), b, dtype.type(0))
        got = run(product, a, finite, np.zeros((64, 256), np.float32), standard_layouts(product))
        np.testing.assert_array_equal(got[:16], finite.astype(np.float32).T)
        got = run(product, np.eye(64, 16).astype(dtype), b, np.zeros((64, 256), np.float32), standard_layouts(product))
        with np.errstate(invalid="ignore"):
            want = a.astype(np.float32) @ b.astype(np.float32).T
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
        np.testing.assert_array_equal(got[~np.isnan(want)], want[~np.isnan(want)])


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_every_8_bit_value(name):
    product = Product(a=name, b=name, n=8)
    codes = np.arange(256, dtype=np.uint8).reshape(8, 32).view(TYPES[name])
    b = np.where(np.isfinite(codes.astype(np.float32)), codes, TYPES[name].type(0))
    got = run(product, np.eye(64, 32).astype(TYPES[name]), b, np.zeros((64, 8), np.float32), standard_layouts(product))
    np.testing.assert_array_equal(got[:32], b.astype(np.float32).T)
    special = b.copy()
    special.view(np.uint8)[3, 5] = 0x7F if name == "e4m3" else 0x7C  # NaN, infinity
    ones, zeros = np.ones((64, 32)).astype(TYPES[name]), np.zeros((64, 8), np.float32)
    row = run(product, ones, special, zeros, standard_layouts(product))
    assert np.isnan(row[:, 3]).all() if name == "e4m3" else (row[:, 3] == np.inf).all()


def test_tf32_ignores_the_low_13_bits():
    product = Product(a="tf32", b="tf32", n=8)
    rng = np.random.default_rng(0)
    b = rng.standard_normal((8, 8)).astype(np.float32)
    got = run(product, np.eye(64, 8, dtype=np.float32), b, np.zeros((64, 8), np.float32), standard_layouts(product))
    np.testing.assert_array_equal(got[:8], (b.view(np.uint32) & 0xFFFFE000).view(np.float32).T)


def test_f16_accumulators_are_rounded_to_nearest_even():
    product = Product(a="f16", b="f16", d="f16", n=8)
    rng = np.random.default_rng(1)
    a, b = np.zeros((64, 16), np.float16), np.zeros((8, 16), np.float16)
    a[:, 3], b[:, 3] = rng.standard_normal(64), rng.standard_normal(8)
    d = rng.standard_normal((64, 8)).astype(np.float16)
    want = (np.outer(a[:, 3].astype(np.float64), b[:, 3]) + d.astype(np.float64)).astype(np.float32).astype(np.float16)
    np.testing.assert_array_equal(run(product, a, b, d, standard_layouts(product)), want)


def test_integer_accumulators_wrap_or_saturate():
    for satfinite in (False, True):
        product = Product(a="s8", b="u8", d="s32", n=16, satfinite=satfinite)
        a, b, _ = operands(product)
        d = np.where(np.arange(64 * 16).reshape(64, 16) % 2, 2**31 - 1, -(2**31)).astype(np.int32)
        want = a.astype(np.int64) @ b.astype(np.int64).T + d
        assert (want != want.astype(np.int32)).any()
        want = np.clip(want, -(2**31), 2**31 - 1) if satfinite else want
        np.testing.assert_array_equal(run(product, a, b, d, standard_layouts(product)), want.astype(np.int32))


# ---- shapes, immediates


def test_every_n():
    floats = tuple(Product(n=n) for n in range(8, 257, 8))
    integer = tuple(Product(a="s8", b="u8", d="s32", n=n) for n in (8, *range(16, 257, 16), 24))
    for among in (floats, integer):
        for product in among:
            a, b, d = operands(product, product.n)
            got = run(product, a, b, d, standard_layouts(product), among=among, checks=())
            np.testing.assert_array_equal(got, exact(product, a, b, d))


@pytest.mark.parametrize("scale", list(itertools.product((-1, 1), repeat=2)), ids=str)
@pytest.mark.parametrize("scale_d", [0, 1])
def test_scale_and_negation(scale, scale_d):
    product = Product(n=40, registers=True, b_mn=True, scale=scale)
    a, b, d = operands(product)
    got = run(product, a, b, d, standard_layouts(product), scale_d=scale_d)
    np.testing.assert_array_equal(got, exact(product, a, b, scale_d * d))


def test_sums_stay_within_the_interval_of_f32():
    product = Product(n=256)
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((64, 16)).astype(TYPES["bf16"]), rng.standard_normal((256, 16)).astype(TYPES["bf16"])
    d = rng.standard_normal((64, 256)).astype(np.float32)
    got = run(product, a, b, d, standard_layouts(product))
    want = a.astype(np.float64) @ b.astype(np.float64).T + d
    room = np.abs(a.astype(np.float64)) @ np.abs(b.astype(np.float64)).T + np.abs(d)
    assert (np.abs(got - want) <= 17 * 2.0**-24 * room).all()


# ---- sequences

SEQUENCE = r"""
typedef unsigned long long u64;
__device__ __forceinline__ void product(float (&d)[8], u64 a, u64 b, int scale_d) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7}, "
               "%8, %9, p, 1, 1, 0, 0;\n}"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
               : "l"(a), "l"(b), "r"(scale_d));
}
__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// x and y grow in turn; x starts anew at the second of its three products of a step; two groups overlap.
extern "C" __global__ void k(const uint4* image, int bytes, float* out_x, float* out_y, u64 a, u64 b, int steps) {
  extern __shared__ __align__(1024) uint4 smem[];
  for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x) smem[i] = image[i];
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  u64 base = (unsigned)__cvta_generic_to_shared(smem) >> 4;
  a += base + threadIdx.x / 128 * (8192 >> 4);
  b += base;
  float x[8], y[8], total[8];
  for (int i = 0; i < 8; i++) x[i] = 1e30f, y[i] = 0, total[i] = 0;
  fence();
  for (int step = 0; step < steps; step++) {
    product(x, a, b, 1);
    product(y, a + 2, b + 2, 1);
    product(x, a + 4, b + 4, 0);
    product(x, a + 6, b + 6, 1);
    commit();
    product(y, a + 2, b, 1);
    commit();
    wait<1>();
    for (int i = 0; i < 8; i++) total[i] += x[i];
    fence();
  }
  wait<0>();
  for (int i = 0; i < 8; i++) {
    out_x[threadIdx.x * 8 + i] = total[i];
    out_y[threadIdx.x * 8 + i] = y[i];
  }
}
"""


@pytest.mark.parametrize("mode, seed", [("eager", 0), ("late", 0), *(("random", seed) for seed in range(4))])
def test_products_in_sequence(mode, seed):
    kernel = host.RawModule(code=SEQUENCE, arch="sm_90a").get_function("k")
    kernel.max_dynamic_shared_size_bytes = SMEM
    rng = np.random.default_rng(4)
    a, b = integers(rng, (128, 64), "bf16"), integers(rng, (16, 64), "bf16")
    image = np.full(SMEM, 0xFF, np.uint8)
    lefts = [Layout("128B", False, 8192 * i, 16, 1024) for i in range(2)]
    right = Layout("128B", False, 32768, 16, 1024)
    for step in range(4):
        columns = slice(16 * step, 16 * step + 16)
        for i in range(2):
            moved = Layout("128B", False, lefts[i].start + 32 * step, 16, 1024)
            lay_out(image, a[64 * i : 64 * i + 64, columns], moved)
        lay_out(image, b[:, columns], Layout("128B", False, right.start + 32 * step, 16, 1024))
    outs = [np.zeros((256, 8), np.float32) for _ in range(2)]
    steps = 5
    with host.check("mem", "init", "race"), host.schedule(mode, seed):
        descriptors = (np.uint64(lefts[0].descriptor()), np.uint64(right.descriptor()))
        kernel((1,), (256,), (image, np.int32(SMEM), *outs, *descriptors, np.int32(steps)), shared_mem=SMEM)
    p = [a[:, 16 * s : 16 * s + 16].astype(np.float32) for s in range(4)]
    q = [b[:, 16 * s : 16 * s + 16].astype(np.float32) for s in range(4)]
    want_x, want_y = steps * (p[2] @ q[2].T + p[3] @ q[3].T), steps * (p[1] @ q[1].T + p[1] @ q[0].T)
    for out, want in zip(outs, (want_x, want_y), strict=True):
        got = [matrix_of(part, 16, np.dtype(np.float32)) for part in out.view(np.uint32).reshape(2, 128, 8)]
        np.testing.assert_array_equal(np.concatenate(got), want)


@pytest.mark.parametrize("types", ["bf16-bf16-f32", "f16-f16-f16", "tf32-tf32-f32", "e4m3-e5m2-f32"])
def test_every_instruction_set_gives_the_same_bits(types, monkeypatch):
    a_type, b_type, d_type = types.split("-")
    product = Product(a=a_type, b=b_type, d=d_type, n=104)
    rng = np.random.default_rng(5)
    a, b = (rng.standard_normal((rows, product.k)).astype(TYPES[t]) for rows, t in ((64, a_type), (104, b_type)))
    d = rng.standard_normal((64, 104)).astype(np.float16 if d_type == "f16" else np.float32)
    results = []
    for isa in library.load().isas:
        monkeypatch.setenv("CUATTN_HOST_ISA", isa)
        monkeypatch.setattr(library, "_loaded", None)
        results.append(run(product, a, b, d, standard_layouts(product)))
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)
