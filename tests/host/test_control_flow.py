"""Divergence, joins, barriers and warp-level instructions, against what each thread computes on its own."""

from __future__ import annotations

import numpy as np
import pytest

import cuattn.host as host
from cuattn import errors


def run(code, args, *, grid=(1,), block=(32,), mode="late", seed=0, **module_options):
    kernel = host.RawModule(code=code, **module_options).get_function("k")
    with host.check("all"), host.schedule(mode, seed):
        kernel(grid, block, args)


def test_nested_divergence_and_loops_of_different_length():
    code = r"""
extern "C" __global__ void k(int* y) {
  int i = threadIdx.x, n = i % 7, sum = 0;
  for (int j = 0; j <= n; j++) {
    if (j % 2) { if (i % 3 == 0) sum += 100; else sum += j; }
    else if (j == 4) break;
    else sum -= j;
    if (i == 13 && j == 3) continue;
    sum += 1;
  }
  y[i] = sum;
}
"""
    y = np.zeros(96, np.int32)
    run(code, (y,), block=(96,))
    expected = []
    for i in range(96):
        total = 0
        for j in range(i % 7 + 1):
            if j % 2:
                total += 100 if i % 3 == 0 else j
            elif j == 4:
                break
            else:
                total -= j
            if i == 13 and j == 3:
                continue
            total += 1
        expected.append(total)
    assert y.tolist() == expected


def test_threads_that_exit_early_do_not_hold_up_a_barrier():
    code = r"""
extern "C" __global__ void k(int* y) {
  __shared__ int s[128];
  if (threadIdx.x >= 64) return;
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = s[63 - threadIdx.x];
}
"""
    y = np.zeros(64, np.int32)
    run(code, (y,), block=(128,))
    assert (y == 63 - np.arange(64)).all()


def test_a_block_that_is_no_multiple_of_a_warp():
    code = r"""
extern "C" __global__ void k(int* y) {
  int i = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  int total = __syncthreads_count(threadIdx.x == 0);
  y[i] = total * 1000 + threadIdx.x * 100 + threadIdx.y * 10 + threadIdx.z;
}
"""
    y = np.zeros(5 * 3 * 3, np.int32)
    run(code, (y,), block=(5, 3, 3))
    expected = [9 * 1000 + x * 100 + yy * 10 + z for z in range(3) for yy in range(3) for x in range(5)]
    assert y.tolist() == expected


def test_barrier_reductions_and_named_barriers():
    code = r"""
extern "C" __global__ void k(int* y) {
  int t = threadIdx.x;
  int any = __syncthreads_or(t == 70), all = __syncthreads_and(t < 1000), none = __syncthreads_and(t != 5);
  __shared__ int s[2];
  if (t < 64) {                       // producers
    if (t == 0) { s[0] = 7; s[1] = 8; }
    asm volatile("bar.arrive 3, 128;" ::: "memory");
    y[t] = any * 4 + all * 2 + none;
  } else {                            // consumers
    asm volatile("bar.sync 3, 128;" ::: "memory");
    y[t] = s[t % 2];
  }
}
"""
    for seed in range(5):
        y = np.zeros(128, np.int32)
        run(code, (y,), block=(128,), mode="random", seed=seed)
        assert (y[:64] == 6).all() and (y[64:] == np.tile([7, 8], 32)).all()


def test_shuffles_votes_matches_reductions():
    code = r"""
extern "C" __global__ void k(int* y) {
  unsigned all = ~0u;
  int t = threadIdx.x, v = t * t;
  int* row = y + t * 16;
  row[0] = __shfl_xor_sync(all, v, 5);
  row[1] = __shfl_up_sync(all, v, 3);
  row[2] = __shfl_down_sync(all, v, 3, 8);
  row[3] = __shfl_sync(all, v, t + 2, 4);
  row[4] = __ballot_sync(all, t % 3 == 0);
  row[5] = __any_sync(all, t == 40);
  row[6] = __all_sync(all, t >= 0);
  row[7] = __match_any_sync(all, t / 5);
  int same;
  row[8] = __match_all_sync(all, 17, &same) + same;
  row[9] = __reduce_add_sync(all, v);
  row[10] = __reduce_max_sync(all, -v);
  row[11] = __reduce_xor_sync(all, (unsigned)v);
  row[12] = __activemask();
  unsigned half = t % 2 ? 0xaaaaaaaau : 0x55555555u;
  int sum = v;
  if (t % 2) { for (int d = 2; d < 32; d *= 2) sum += __shfl_xor_sync(half, sum, d); }
  else       { for (int d = 2; d < 32; d *= 2) sum += __shfl_xor_sync(half, sum, d); }
  row[13] = sum;
}
"""
    y = np.zeros((32, 16), np.int32)
    run(code, (y,))
    t = np.arange(32)
    v = t * t
    assert (y[:, 0] == v[t ^ 5]).all()
    assert (y[:, 1] == np.where(t >= 3, v[t - 3], v)).all()
    assert (y[:, 2] == np.where(t % 8 + 3 < 8, v[np.minimum(t + 3, 31)], v)).all()
    assert (y[:, 3] == v[t // 4 * 4 + (t + 2) % 4]).all()
    assert (y[:, 4].view(np.uint32) == sum(1 << i for i in range(0, 32, 3))).all()
    assert (y[:, 5] == 0).all() and (y[:, 6] == 1).all()
    assert all(np.uint32(y[i, 7]) == sum(1 << j for j in range(32) if j // 5 == i // 5) for i in t)
    assert (y[:, 8] == 0).all()  # ~0 + 1
    assert (y[:, 9] == v.sum()).all() and (y[:, 10] == 0).all()
    assert (y[:, 11] == np.bitwise_xor.reduce(v)).all()
    assert (y[:, 12] == -1).all()
    assert (y[:, 13] == np.where(t % 2, v[1::2].sum(), v[::2].sum())).all()


def test_atomics_of_every_kind():
    code = r"""
extern "C" __global__ void k(int* y, unsigned long long* z, float* f) {
  __shared__ int s;
  if (threadIdx.x == 0) s = 0;
  __syncthreads();
  int t = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&s, 1);
  atomicAdd(y, t); atomicMin(y + 1, -t); atomicMax(y + 2, t); atomicXor(y + 3, t); atomicOr(y + 4, 1 << (t % 31));
  atomicAnd(y + 5, ~(1 << (t % 7))); atomicInc((unsigned*)y + 6, 9); atomicDec((unsigned*)y + 7, 9);
  int old = atomicCAS(y + 8, 0, t + 1);
  if (old == 0) atomicExch(y + 9, t + 1);
  atomicAdd(z, 1ull << 33);
  atomicAdd(f, 0.5f);
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(y + 10, s);
}
"""
    y, z, f = np.zeros(11, np.int32), np.zeros(1, np.uint64), np.zeros(1, np.float32)
    y[5] = -1
    run(code, (y, z, f), grid=(4,), block=(64,))
    t = np.arange(256)
    assert y[0] == t.sum() and y[1] == -255 and y[2] == 255 and y[3] == np.bitwise_xor.reduce(t)
    assert y[4] == 2**31 - 1 and y[5] == ~127 and y[6] == 256 % 10 and y[7] == (-256) % 10
    assert y[8] == y[9] != 0
    assert z[0] == 256 << 33 and f[0] == 128 and y[10] == 256


def test_constant_and_device_variables_and_a_struct_by_value():
    code = r"""
struct Pair { int a; float b; long long c; };
__constant__ float table[4] = {1.5f, 2.5f, 3.5f, 4.5f};
__device__ int counter = 3;
extern "C" __global__ void k(float* y, Pair p) {
  y[threadIdx.x] = table[threadIdx.x % 4] + p.a + p.b + (float)p.c;
  if (threadIdx.x == 0) counter += 1;
}
"""
    module = host.RawModule(code=code)
    struct = np.zeros(1, np.dtype([("a", "i4"), ("b", "f4"), ("c", "i8")]))
    struct[0] = (1, 0.25, 10)
    y = np.zeros(32, np.float32)
    with host.check("all"):
        module.get_function("k")((1,), (32,), (y, struct[0]))
    assert (y == np.tile([1.5, 2.5, 3.5, 4.5], 8) + 11.25).all()
    assert module.get_global("counter").view(np.int32)[0] == 4


def test_generic_addresses_reach_shared_local_and_global_memory():
    code = r"""
extern "C" __global__ void k(const int* x, int* y, int which) {
  __shared__ int s[32];
  int local[4];
  for (int i = 0; i < 4; i++) local[(i + which) % 4] = 100 + i;
  s[threadIdx.x] = 200 + threadIdx.x;
  __syncwarp();
  const int* p = threadIdx.x % 3 == 0 ? x : threadIdx.x % 3 == 1 ? s : local;
  y[threadIdx.x] = p[threadIdx.x % 4];
}
"""
    x, y = np.arange(4, dtype=np.int32), np.zeros(32, np.int32)
    run(code, (x, y, np.int32(0)))
    t = np.arange(32)
    assert (y == np.choose(t % 3, [x[t % 4], 200 + t % 4, 100 + t % 4])).all()


def test_what_is_not_known_is_refused_with_the_instruction_and_the_line():
    code = r"""
extern "C" __global__ void k(int* y) {
  int v;
  asm("dp4a.s32.s32 %0, 1, 2, 3;\n\tvabsdiff4.u32.u32.u32 %0, 1, 2, 3;" : "=r"(v));  // FAULT
  *y = v;
}
"""
    with pytest.raises(errors.UnsupportedPTXError, match=r"vabsdiff4.*:4"):
        host.RawModule(code=code)


def test_inline_assembly_scopes_registers_and_labels():
    code = r"""
__device__ __forceinline__ int count_down(int n) {
  int sum;
  asm volatile("{\n.reg .pred p;\n.reg .s32 i;\nmov.s32 %0, 0;\nmov.s32 i, %1;\nLOOP:\nadd.s32 %0, %0, i; // sum\n"
               "sub.s32 i, i, 1; setp.gt.s32 p, i, 0;\n@p bra LOOP;\n}" : "=&r"(sum) : "r"(n));
  return sum;
}
extern "C" __global__ void k(int* y) { y[threadIdx.x] = count_down(threadIdx.x + 1) * 1000 + count_down(3); }
"""
    y = np.zeros(32, np.int32)
    run(code, (y,))
    n = np.arange(1, 33)
    assert (y == n * (n + 1) // 2 * 1000 + 6).all()


def test_a_call_that_is_not_inlined_is_refused():
    code = r"""
__device__ __noinline__ int twice(int x) { return x * 2 + (int)clock(); }
extern "C" __global__ void k(int* y) { *y = twice(*y); }
"""
    with pytest.raises(errors.UnsupportedPTXError, match="function that was not inlined"):
        host.RawModule(code=code)
