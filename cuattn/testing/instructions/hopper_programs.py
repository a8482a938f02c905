"""Instructions of Hopper that no single lane can show, mbarriers, bulk copies, wgmma: programs with exact answers.

They go through the functions of the headers that the kernels of this package use. A `Program` is a launch and the words
that it must leave in its output; the numbers are small, so that sums are exact in whatever order they are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cuattn.compile import expand
from cuattn.runtime.tensor_map import tensor_map

ARCH = "sm_90a"
ROWS, WGMMA_N, SMEM_BYTES = 8, 64, 1024 + 2 * 64 * 128

SOURCE = r"""
#define KERNEL extern "C" __global__ void
__device__ __forceinline__ bool mbarrier_test(unsigned s_barrier, unsigned parity) {
    unsigned done;
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
                 : "=r"(done) : "r"(s_barrier), "r"(parity) : "memory");
    return done;
}
__device__ __forceinline__ void start(unsigned s_barrier, unsigned bytes) {
    mbarrier_init(s_barrier, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(s_barrier, bytes);
}
__device__ __forceinline__ void bulk_done() {
    asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;" ::: "memory");
}

// Phases of two arrivals and of bytes.
KERNEL mbarrier(unsigned* out, const unsigned* in) {
    __shared__ alignas(8) unsigned long long s_barrier;
    if (threadIdx.x != 0) return;
    const unsigned at = smem_address(&s_barrier);
    mbarrier_init(at, 2);
    out[0] = mbarrier_test(at, 1);
    out[1] = mbarrier_test(at, 0);
    mbarrier_arrive(at);
    out[2] = mbarrier_test(at, 0);
    mbarrier_arrive(at);
    out[3] = mbarrier_test(at, 0);
    mbarrier_arrive_expect(at, 32);
    mbarrier_arrive(at);
    out[4] = mbarrier_test(at, 1);
    asm volatile("mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%0], 32;" ::"r"(at) : "memory");
    mbarrier_wait(at, 1);
    out[5] = mbarrier_test(at, 1);
    asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(at) : "memory");
}

// Into shared memory, doubled there, and back.
KERNEL bulk_copy(unsigned* out, const unsigned* in) {
    __shared__ alignas(128) unsigned s_words[256];
    __shared__ alignas(8) unsigned long long s_barrier;
    const unsigned at = smem_address(&s_barrier);
    if (threadIdx.x == 0) {
        start(at, 1024);
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 1024, [%2];"
                     ::"r"(smem_address(s_words)), "l"(in), "r"(at) : "memory");
    }
    __syncthreads();
    mbarrier_wait(at, 0);
    for (int i = threadIdx.x; i < 256; i += blockDim.x) s_words[i] *= 2;
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 1024;"
                     ::"l"(out), "r"(smem_address(s_words)) : "memory");
        bulk_done();
    }
}

// Added to what is there, twice.
KERNEL bulk_reduce(unsigned* out, const unsigned* in) {
    __shared__ alignas(128) unsigned s_words[256];
    for (int i = threadIdx.x; i < 256; i += blockDim.x) s_words[i] = in[i];
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%0], [%1], 1024;"
                         ::"l"(out), "r"(smem_address(s_words)) : "memory");
            bulk_done();
        }
    }
}

// A box as it lies in shared memory: swizzled, and zero outside the array.
KERNEL tensor_load(unsigned* out, const __grid_constant__ TensorMap map, int column, int row, int bytes) {
    extern __shared__ __align__(1024) unsigned char s_tile[];
    __shared__ alignas(8) unsigned long long s_barrier;
    const unsigned at = smem_address(&s_barrier);
    if (threadIdx.x == 0) {
        tma_prefetch_map(map);
        start(at, bytes);
        tma_load(smem_address(s_tile), map, at, L2_EVICT_LAST, column, row, 0, 0);
    }
    __syncthreads();
    mbarrier_wait(at, 0);
    for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) out[i] = reinterpret_cast<unsigned*>(s_tile)[i];
}

// Every thread keeps its number while registers move between the warpgroups.
KERNEL __launch_bounds__(384, 1) registers(unsigned* out, const unsigned* in) {
    if (threadIdx.x < 128) release_registers<40>();
    else claim_registers<232>();
    out[threadIdx.x] = threadIdx.x;
}

// Four fragments to the rows of a matrix.
KERNEL stmatrix(unsigned* out, const unsigned* in) {
    __shared__ alignas(128) unsigned s_rows[128];
    const unsigned frag[4] = {in[threadIdx.x], in[32 + threadIdx.x], in[64 + threadIdx.x], in[96 + threadIdx.x]};
    stmatrix_x4(smem_address(&s_rows[4 * threadIdx.x]), frag);
    __syncwarp();
    for (int i = threadIdx.x; i < 128; i += 32) out[i] = s_rows[i];
}

// a [64, 128 bytes] times b: K-major [64, 128 bytes], or MN-major [64 of k, 64]. FROM_REGISTERS: a as fragments.
template <typename Element, bool TRANSPOSED, bool FROM_REGISTERS>
__device__ void multiply(float* out, const Element* a, const TensorMap& map_a, const TensorMap& map_b) {
    extern __shared__ __align__(1024) unsigned char s_tile[];
    __shared__ alignas(8) unsigned long long s_barrier;
    constexpr int TILE_BYTES = 64 * SPAN_BYTES, STEPS = SPAN_BYTES / WGMMA_K_BYTES, K = SPAN_BYTES / sizeof(Element);
    const unsigned at = smem_address(&s_barrier), s_a = smem_address(s_tile), s_b = s_a + TILE_BYTES;
    if (threadIdx.x == 0) {
        start(at, 2 * TILE_BYTES);
        tma_load(s_a, map_a, at, L2_EVICT_FIRST, 0, 0, 0, 0);
        tma_load(s_b, map_b, at, L2_EVICT_FIRST, 0, 0, 0, 0);
    }
    __syncthreads();
    mbarrier_wait(at, 0);
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
    float acc[8][4] = {};
    unsigned frag[STEPS][4];
    for (int step = 0; step < STEPS; step++) {
        for (int i = 0; i < 4; i++) {  // rows 8 apart, then 16 bytes of k
            const char* line = reinterpret_cast<const char*>(a + (row + i % 2 * 8) * K);
            frag[step][i] = *reinterpret_cast<const unsigned*>(line + step * WGMMA_K_BYTES + i / 2 * 16 + lane % 4 * 4);
        }
    }
    const unsigned long long desc_a = wgmma_descriptor(s_a, SPAN_BYTES), desc_b = wgmma_descriptor(s_b, TILE_BYTES);
    wgmma_fence();
    for (int step = 0; step < STEPS; step++) {
        const unsigned long long b = desc_b + step * (TRANSPOSED ? 16 * SPAN_BYTES : WGMMA_K_BYTES) / 16;
        if (FROM_REGISTERS) Wgmma<64>::issue<TRANSPOSED>(Element(), acc, frag[step], b, 1);
        else Wgmma<64>::issue<TRANSPOSED>(Element(), acc, desc_a + step * WGMMA_K_BYTES / 16, b, 1);
    }
    wgmma_commit();
    wgmma_wait<0>();
    for (int tile = 0; tile < 8; tile++)
        for (int i = 0; i < 4; i++) out[(row + i / 2 * 8) * 64 + tile * 8 + lane % 4 * 2 + i % 2] = acc[tile][i];
}
#define PRODUCT(NAME, ELEMENT, ...)                                                                            \
    KERNEL NAME(float* out, const ELEMENT* a, const __grid_constant__ TensorMap map_a,                         \
                const __grid_constant__ TensorMap map_b) { multiply<ELEMENT, __VA_ARGS__>(out, a, map_a, map_b); }
PRODUCT(wgmma_f16, __half, false, false)
PRODUCT(wgmma_f16_transposed, __half, true, false)
PRODUCT(wgmma_f16_registers, __half, false, true)
PRODUCT(wgmma_bf16, __nv_bfloat16, false, false)
PRODUCT(wgmma_bf16_transposed_registers, __nv_bfloat16, true, true)
PRODUCT(wgmma_e4m3, Float8E4M3, false, false)
PRODUCT(wgmma_e4m3_registers, Float8E4M3, false, true)
"""

Upload = Callable[[NDArray[Any]], Any]


@dataclass(frozen=True)
class Program:
    """A launch of one CTA, and what its output must be.

    Attributes
    ----------
    name, entry : str
    threads, smem_bytes : int
    initial, expected : uint32 array, the output before and after
    arguments : callable; takes how arrays come to the executor, returns those behind the output
    """

    name: str
    entry: str
    threads: int
    smem_bytes: int
    initial: NDArray[np.uint32]
    expected: NDArray[np.uint32]
    arguments: Callable[[Upload], list[Any]]

    def mismatches(self, answer: NDArray[np.uint32]) -> list[str]:
        """List what is wrong with an answer, a line a word."""
        wrong = np.flatnonzero(answer != self.expected)
        return [f"{self.name} word {i}: {answer[i]:#x}, expected {self.expected[i]:#x}" for i in wrong]


def source() -> str:
    """Return the source of all programs, with the headers that they need."""
    return expand.header("hopper/wgmma.cuh") + '#line 1 "hopper_programs.cu"\n' + SOURCE


@cache
def programs() -> tuple[Program, ...]:
    """Return the table of programs."""
    words = np.random.default_rng(0).integers(0, 2**31, 256, np.uint32)
    zeros = np.zeros(256, np.uint32)

    def simple(entry: str, threads: int, initial: NDArray[Any], expected: NDArray[Any]) -> Program:
        return Program(entry, entry, threads, 0, initial, expected.astype(np.uint32), lambda upload: [upload(words)])

    return (
        simple("mbarrier", 32, zeros[:6], np.array([1, 0, 0, 1, 0, 1])),
        simple("bulk_copy", 64, zeros, words * np.uint32(2)),
        simple("bulk_reduce", 64, words, words * np.uint32(3)),
        simple("registers", 384, np.zeros(384, np.uint32), np.arange(384)),
        # Lane l holds words l % 4 of row l / 4 of each of the four matrices, which follow each other.
        simple("stmatrix", 32, zeros[:128], words[:128]),
        *_loads(words),
        *_products(),
    )


def _loads(words: NDArray[np.uint32]) -> Iterator[Program]:
    """Boxes of eight rows, as wide as the swizzle, inside an array of 8 rows of 32 words and across its edges."""
    array = words.reshape(1, 1, 8, 32)
    for swizzle, width in (("none", 128), ("32B", 32), ("64B", 64), ("128B", 128)):
        lines = {"none": 1, "32B": 2, "64B": 4, "128B": 8}[swizzle]
        for column, row in ((0, 0), (-4, -3), (28, 5)):
            padded = np.zeros((24, 96), np.uint32)
            padded[8:16, 32:64] = array[0, 0]
            box = padded[8 + row : 16 + row, 32 + column : 32 + column + width // 4]
            # The 16-byte pieces of every 128 bytes are permuted by the number of those 128 bytes.
            pieces = box.reshape(-1, 4)
            place = np.arange(len(pieces))
            expected = np.empty_like(pieces)
            expected[place ^ (place // 8 % lines)] = pieces

            def arguments(upload: Upload, swizzle=swizzle, width=width, column=column, row=row) -> list[Any]:  # type: ignore[no-untyped-def]
                described = tensor_map(upload(array), (width // 4, ROWS, 1, 1), swizzle=swizzle)
                return [described, np.int32(column), np.int32(row), np.int32(ROWS * width)]

            name = f"tensor_load {swizzle} at {column}, {row}"
            initial = np.zeros(expected.size, np.uint32)
            yield Program(name, "tensor_load", 64, ROWS * width, initial, expected.reshape(-1), arguments)


def _products() -> Iterator[Program]:
    formats = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "e4m3": ml_dtypes.float8_e4m3fn}
    rng = np.random.default_rng(1)
    for name, suffixes in (
        ("f16", ("", "_transposed", "_registers")),
        ("bf16", ("", "_transposed_registers")),
        ("e4m3", ("", "_registers")),
    ):
        dtype = np.dtype(formats[name])
        depth = 128 // dtype.itemsize
        a = rng.integers(-4, 5, (1, 1, 64, depth)).astype(np.float32)
        b = rng.integers(-4, 5, (depth, WGMMA_N)).astype(np.float32)
        expected = (a[0, 0] @ b).view(np.uint32).reshape(-1)
        for suffix in suffixes:
            lies = b if "transposed" in suffix else np.ascontiguousarray(b.T)

            def arguments(upload: Upload, a=a, lies=lies, dtype=dtype) -> list[Any]:  # type: ignore[no-untyped-def]
                left, right = upload(a.astype(dtype)), upload(lies.astype(dtype).reshape(1, 1, *lies.shape))
                maps = (tensor_map(x, (128 // dtype.itemsize, 64, 1, 1), swizzle="128B") for x in (left, right))
                return [left, *maps]

            entry = f"wgmma_{name}{suffix}"
            initial = np.zeros(64 * WGMMA_N, np.uint32)
            yield Program(entry, entry, 128, 2 * 64 * 128, initial, expected, arguments)
