"""wgmma: each rule has a kernel that breaks it in one place and is reported there, and one that is right and silent."""

from __future__ import annotations

from string import Template

import ml_dtypes
import numpy as np
import pytest

import cuattn.host as host
from cuattn import errors

# Four warps, D [64, 8] += A [64, 16] B [16, 8], everything K-major without a swizzle. A test replaces one of the marked
# places; the line that must be reported carries FAULT.
KERNEL = Template(r"""
typedef unsigned long long u64;
__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
__device__ __forceinline__ u64 matrix(const void* start, unsigned leading, unsigned stride) {
  return (u64)((unsigned)__cvta_generic_to_shared(start) >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32;
}
#define PRODUCT(d, a, b)                                                                             \
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b))
#define PRODUCT_RS(d, f, b)                                                                          \
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, "             \
               "{%4, %5, %6, %7}, %8, 1, 1, 1, 0;"                                                  \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(f[0]), "r"(f[1]), "r"(f[2]), "r"(f[3]), "l"(b))
#define PRODUCT_SHORT(c, d0, d1, a, b)                                                               \
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f16.f16.f16 {%0, %1}, %2, %3, 1, 1, 1, 0, 0;" \
               : c(d0), c(d1) : "l"(a), "l"(b))
#define ADD_ONE(x) asm volatile("add.f32 %0, %0, 0f3F800000;" : "+f"(x))
#define XOR_ONE(x) asm volatile("xor.b32 %0, %0, 1;" : "+r"(x))
#define STORE(to, x) asm volatile("st.global.f32 [%0], %1;" ::"l"(to), "f"(x) : "memory")
extern "C" __global__ void k(const uint4* image, float* out) {
  extern __shared__ __align__(1024) uint4 smem[];  // A in 2048 bytes, B in 256, 16 more that stay unwritten
  const int t = threadIdx.x, warp = t / 32, lane = t % 32;
  for (int i = t; i < 144; i += 128) smem[i] = image[i];
  ${after_stores}
  __syncthreads();
  u64 a = matrix(smem, 128, 256), b = matrix(smem + 128, 128, 256);
  ${descriptors}
  float d[4] = {0, 0, 0, 0};
  unsigned f[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
  for (int i = 0; i < 4; i++) {
    ADD_ONE(d[i]);
    XOR_ONE(f[i]);
  }
  ${first_fence}
  ${product}
  ${commit}
  ${in_flight}
  ${wait}
  for (int i = 0; i < 4; i++) out[t * 4 + i] = d[i];
}
""")
RIGHT = {
    "after_stores": "proxy_fence();", "descriptors": "", "first_fence": "fence();", "product": "PRODUCT(d, a, b);",
    "commit": "commit();", "in_flight": "", "wait": "wait<0>();",
}  # fmt: skip


def launch(*, mode="late", seed=0, block=128, checks=("mem", "init", "race"), **places: str) -> np.ndarray:
    code = KERNEL.substitute(RIGHT | places)
    kernel = host.RawModule(code=code, arch="sm_90a").get_function("k")
    image = np.ones(8 * 144, ml_dtypes.bfloat16)
    out = np.zeros(1024, np.float32)
    with host.check(*checks), host.schedule(mode, seed):
        kernel((1,), (block,), (image, out), shared_mem=144 * 16 + 16)
    return out


def expect(error, *words, mode="late", seed=0, block=128, **places: str) -> None:
    code = KERNEL.substitute(RIGHT | places)
    with pytest.raises(error) as caught:
        launch(mode=mode, seed=seed, block=block, **places)
    text = str(caught.value)
    for word in words:
        assert word in text
    lines = [number for number, line in enumerate(code.splitlines(), 1) if "FAULT" in line]
    assert len(lines) == 1 and f":{lines[0]}" in text


@pytest.mark.parametrize("mode, seed", [("eager", 0), ("late", 0), *(("random", seed) for seed in range(5))])
def test_the_right_kernels_pass(mode, seed):
    assert (launch(mode=mode, seed=seed)[:512] == 17).all()
    ones = launch(mode=mode, seed=seed, product="PRODUCT_RS(d, f, b);")[:512]
    assert (ones > 16).all()  # the low halves of A are a little more than one
    two = "fence(); PRODUCT(d, a, b); commit();"
    assert (launch(mode=mode, seed=seed, in_flight=two)[:512] == 33).all()
    changed = "wait<0>(); for (int i = 0; i < 4; i++) ADD_ONE(d[i]);" + two
    assert (launch(mode=mode, seed=seed, in_flight=changed)[:512] == 34).all()


# ---- registers in flight

WAITED = "wait<0>(); fence();"


@pytest.mark.parametrize(
    "touch, word",
    [
        ("STORE(out + 512 + t, d[1]);", "reads an accumulator"),
        ("ADD_ONE(d[2]);", "an accumulator"),
        ("d[0] = d[0] * 2;", "an accumulator"),
    ],
)
def test_an_accumulator_in_flight_may_not_be_touched(touch, word):
    launch(in_flight=WAITED + touch)
    expect(errors.AsyncCopyError, word, "in flight", in_flight=touch + "  // FAULT")


def test_the_results_need_a_wait():
    early = "STORE(out + 512 + t, d[0]);"
    expect(errors.AsyncCopyError, "reads an accumulator", in_flight=early + "  // FAULT")
    assert np.isnan(launch(checks=(), in_flight=early)[512:640]).all()  # without the checker: poison
    seen = launch(checks=(), in_flight=early, mode="eager")[512:640]
    assert (seen == 1).sum() == 96 and (seen == 17).sum() == 32  # the warp that commits last sees the result at once


def test_the_wait_must_cover_the_group():
    expect(errors.AsyncCopyError, "reads an accumulator", in_flight="wait<1>(); STORE(out + 512 + t, d[0]);  // FAULT")


def test_a_register_with_a_in_flight_may_not_be_written():
    places = {"product": "PRODUCT_RS(d, f, b);", "wait": "wait<0>(); STORE(out + 512 + t, __uint_as_float(f[3]));"}
    launch(**places, in_flight=WAITED + "XOR_ONE(f[3]);")
    launch(**places, in_flight="STORE(out + 512 + t, __uint_as_float(f[3]));")  # reading is fine
    expect(errors.AsyncCopyError, "writes a register with A", **places, in_flight="XOR_ONE(f[3]);  // FAULT")


def test_accumulators_in_flight_are_no_a():
    places = {
        "product": 'PRODUCT_SHORT("+r", f[0], f[1], a, b);',
        "wait": "wait<0>(); STORE(out + 512 + t, __uint_as_float(f[0]));",
    }
    launch(**places, in_flight=WAITED + "PRODUCT_RS(d, f, b); commit();")
    expect(
        errors.AsyncCopyError, "takes as A an accumulator", **places,
        in_flight="PRODUCT_RS(d, f, b); commit();  // FAULT",
    )  # fmt: skip


def test_accumulators_in_flight_keep_their_shape():
    short = 'PRODUCT_SHORT("+f", d[0], d[1], a, b);'
    launch(in_flight=WAITED + short + "commit();")
    expect(errors.AsyncCopyError, "another shape", in_flight=short + " commit();  // FAULT")


# ---- wgmma.fence


def test_moves_of_constants_need_no_fence_but_moves_of_accumulators_a_wait():
    """NVRTC puts constants behind the fence by itself; a move of an accumulator that it leaves is a real copy."""
    assert (launch(in_flight="wait<0>(); fence(); d[0] = 2.0f; PRODUCT(d, a, b); commit();")[:512:4] == 18).all()
    copy = 'float e; asm volatile("mov.f32 %0, %1;" : "=f"(e) : "f"(d[1]));'
    launch(in_flight="wait<0>(); " + copy, wait="STORE(out + 512 + t, e);")
    expect(errors.AsyncCopyError, "reads an accumulator", in_flight=copy + "  // FAULT", wait="wait<0>(); d[0] += e;")


@pytest.mark.parametrize(
    "product, write", [("PRODUCT(d, a, b);", "ADD_ONE(d[3]);"), ("PRODUCT_RS(d, f, b);", "XOR_ONE(f[2]);")]
)
def test_written_registers_need_a_fence(product, write):
    launch(product=product, in_flight=f"wait<0>(); {write} fence(); {product} commit();")
    expect(
        errors.AsyncCopyError, "no wgmma.fence", product=product,
        in_flight=f"wait<0>(); {write} {product} commit();  // FAULT",
    )  # fmt: skip


def test_reading_an_accumulator_counts_as_an_access():
    launch(in_flight="wait<0>(); STORE(out + 512 + t, d[0]); fence(); PRODUCT(d, a, b); commit();")
    expect(
        errors.AsyncCopyError, "no wgmma.fence",
        in_flight="wait<0>(); STORE(out + 512 + t, d[0]); PRODUCT(d, a, b); commit();  // FAULT",
    )  # fmt: skip


def test_the_first_wgmma_needs_a_fence():
    expect(errors.AsyncCopyError, "no wgmma.fence", first_fence="", product="PRODUCT(d, a, b);  // FAULT")


# ---- shared memory


def test_ordinary_stores_need_a_proxy_fence():
    expect(errors.AsyncCopyError, "fence.proxy.async", after_stores="", product="PRODUCT(d, a, b);  // FAULT")


def test_operands_need_a_barrier():
    code = "proxy_fence(); if (t == %d) smem[130] = image[0]; proxy_fence();"
    product = "PRODUCT(d, a, b);  // FAULT"
    for thread in (5, 101):
        launch(descriptors=code % thread + "__syncthreads();")
    expect(errors.RaceError, "nothing orders", descriptors=code % 101, product=product)
    expect(errors.AsyncCopyError, "nothing orders", descriptors=code % 5 + "  // FAULT")  # its warp comes later


def test_operands_may_not_change_before_the_wait():
    store = "smem[t] = image[0];"
    launch(in_flight="wait<0>(); __syncthreads();" + store)
    expect(errors.AsyncCopyError, "nothing orders", in_flight="__syncthreads(); " + store + "  // FAULT")


def test_operands_are_read_as_late_as_the_wait_allows():
    zeros = "__syncthreads(); smem[128 + t % 16] = make_uint4(0, 0, 0, 0); proxy_fence(); __syncthreads();"
    assert (launch(checks=(), in_flight=zeros)[:512] == 1).all()
    assert (launch(checks=(), in_flight=zeros, mode="eager")[:512] == 17).all()


def test_a_wait_does_not_cover_later_groups():
    two = "fence(); PRODUCT(d, a + 8, b); commit();"  # reads from byte 128 on
    launch(in_flight=two + "wait<0>(); __syncthreads(); smem[t] = image[0];")
    expect(
        errors.AsyncCopyError, "nothing orders",
        in_flight=two + "wait<1>(); __syncthreads(); smem[t] = image[0];  // FAULT",
    )  # fmt: skip


def test_a_descriptor_must_stay_inside_the_memory():
    expect(
        errors.MemoryFaultError, "descriptor of B", descriptors="b = matrix(smem + 128, 8192, 256);",
        product="PRODUCT(d, a, b);  // FAULT",
    )  # fmt: skip


def test_operands_must_have_been_written():
    expect(
        errors.UninitializedReadError, "nothing has written", descriptors="b = matrix(smem + 129, 128, 256);",
        product="PRODUCT(d, a, b);  // FAULT",
    )  # fmt: skip


# ---- the warpgroup


def test_every_warp_must_give_the_same_operands():
    expect(
        errors.DivergenceError,
        "same wgmma",
        descriptors="if (warp == 2) b -= 1;",
        product="PRODUCT(d, a, b);  // FAULT",
    )


def test_every_lane_must_give_the_same_descriptor():
    expect(errors.DivergenceError, "different matrix descriptors", descriptors="if (lane == 9) b += 1;",
           product="PRODUCT(d, a, b);  // FAULT")  # fmt: skip


def test_every_lane_must_take_part():
    expect(errors.DivergenceError, "never come", product="if (lane != 3) PRODUCT(d, a, b);  // FAULT")


def test_a_warpgroup_has_four_warps():
    expect(errors.DivergenceError, "4 warps", block=96, first_fence="fence();  // FAULT")


def test_a_group_that_a_warp_never_commits_is_a_deadlock():
    with pytest.raises(errors.DeadlockError, match="not committed by warp 3"):
        launch(commit="if (warp != 3) commit();", wait="if (warp != 3) wait<0>(); else __syncthreads();")


def test_groups_must_hold_the_same_products():
    expect(errors.DivergenceError, "commit different wgmma",
           product="if (warp != 1) PRODUCT(d, a, b);", commit="commit();  // FAULT")  # fmt: skip


def test_a_kernel_may_not_end_with_products_in_flight():
    expect(errors.AsyncCopyError, "never waited", product="PRODUCT(d, a, b);  // FAULT", commit="commit(); return;")


# ---- refused before anything runs


@pytest.mark.parametrize(
    "text, why",
    [
        ("m64n40k32.s32.s8.s8 {%0, %1, %2, %3}, %4, %5, 1", "n = 40"),
        ("m64n8k16.f32.bf16.f16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0", "types"),
        ("m64n8k16.f16.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0", "types"),
        ("m64n8k8.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0", "m64nNk16"),
        ("m64n8k8.f32.tf32.tf32 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 1", "immediates"),
        ("m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 2, 1, 0, 0", "imm-scale-a"),
        ("m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0", "8 32-bit registers"),
    ],
)
def test_what_the_ptx_isa_does_not_have_is_refused(text, why):
    code = """
extern "C" __global__ void k(float* out) {
  float d[4];
  unsigned long long a = 0, b = 0;
  asm volatile("wgmma.mma_async.sync.aligned.%s;" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
  out[0] = d[0];
}"""
    with pytest.raises(errors.UnsupportedPTXError, match=why):
        host.RawModule(code=code % text, arch="sm_90a")


def test_wgmma_belongs_to_sm_90a():
    with pytest.raises(errors.UnsupportedPTXError, match="sm_90a"):
        host.RawModule(code=KERNEL.substitute(RIGHT), arch="sm_100")
