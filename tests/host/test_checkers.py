"""Every checker catches its seeded fault, names the right source line, and lets the corrected kernel pass."""

from __future__ import annotations

import numpy as np
import pytest

import cuattn.host as host
from cuattn import errors

PTX_WRAPPERS = r"""
__device__ __forceinline__ void copy16(void* dst, const void* src) {
  unsigned to = (unsigned)__cvta_generic_to_shared(dst);
  asm volatile("cp.async.cg.shared.global [%%0], [%%1], 16;" :: "r"(to), "l"(src) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %%0;" :: "n"(N) : "memory");
}
"""


def run(code, args, *, grid=(1,), block=(128,), shared_mem=0, checks=("mem", "init", "race"), mode="late", seed=0):
    kernel = host.RawModule(code=code).get_function("k")
    with host.check(*checks), host.schedule(mode, seed):
        kernel(grid, block, args, shared_mem=shared_mem)


def line_of(code: str, marker: str) -> str:
    """`:LINE` of the only source line that carries ``marker``."""
    lines = [number for number, line in enumerate(code.splitlines(), 1) if marker in line]
    assert len(lines) == 1
    return f":{lines[0]}"


def expect(error, code, args, marker="FAULT", **options):
    with pytest.raises(error) as caught:
        run(code, args, **options)
    assert line_of(code, marker) in str(caught.value)
    assert caught.value.kernel == "k"
    assert caught.value.tid is not None and caught.value.ctaid is not None
    return caught.value


COPY = r"""
extern "C" __global__ void k(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i %s n)
    y[i] = x[i];  // FAULT
}
"""


def test_mem_catches_an_off_by_one_access():
    x, y = np.arange(100, dtype=np.float32), np.zeros(100, np.float32)
    run(COPY % "<", (x, y, np.int32(100)))
    assert (y == x).all()
    fault = expect(errors.MemoryFaultError, COPY % "<=", (x, y, np.int32(100)))
    assert fault.tid == (100, 0, 0)
    assert fault.address == x.ctypes.data + 400


def test_mem_catches_an_off_by_one_store_in_shared_memory():
    code = r"""
extern "C" __global__ void k(float* y) {
  __shared__ float s[64];
  s[threadIdx.x + %d] = 1.0f;  // FAULT
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}
"""
    y = np.zeros(64, np.float32)
    run(code % 0, (y,), block=(64,))
    fault = expect(errors.MemoryFaultError, code % 1, (y,), block=(64,))
    assert fault.tid == (63, 0, 0)


def test_mem_catches_an_access_between_the_elements_of_a_view():
    code = r"""
extern "C" __global__ void k(const float* x, float* y, int stride) {
  y[threadIdx.x] = x[threadIdx.x * stride];  // FAULT
}
"""
    base = np.arange(64, dtype=np.float32)
    y = np.zeros(8, np.float32)
    run(code, (base[::4][:8], y, np.int32(4)), block=(8,))
    assert (y == base[::4][:8]).all()
    expect(errors.MemoryFaultError, code, (base[::4][:8], y, np.int32(3)), block=(8,))


def test_mem_catches_a_misaligned_vector():
    code = r"""
extern "C" __global__ void k(const float* x, float* y) {
  float4 v = *reinterpret_cast<const float4*>(x + 4 * threadIdx.x + %d);  // FAULT
  y[threadIdx.x] = v.x + v.y + v.z + v.w;
}
"""
    x, y = host.empty(64, np.float32), np.zeros(8, np.float32)
    x[:] = 1
    host.finish(x)
    run(code % 0, (x, y), block=(8,))
    expect(errors.MemoryFaultError, code % 1, (x, y), block=(8,))


def test_init_catches_a_read_of_shared_memory_that_nobody_wrote():
    code = r"""
extern "C" __global__ void k(float* y) {
  __shared__ float s[65];
  s[threadIdx.x] = 1.0f;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x + %d];  // FAULT
}
"""
    y = np.zeros(64, np.float32)
    run(code % 0, (y,), block=(64,))
    fault = expect(errors.UninitializedReadError, code % 1, (y,), block=(64,))
    assert fault.tid == (63, 0, 0)


def test_init_catches_a_read_of_an_output_and_follows_it_over_launches():
    write = r"""
extern "C" __global__ void k(float* w, int n) { if (threadIdx.x < n) w[threadIdx.x] = 1.0f; }
"""
    read = r"""
extern "C" __global__ void k(const float* w, float* y) {
  y[threadIdx.x] = w[threadIdx.x];  // FAULT
}
"""
    with host.check("init"):
        workspace = host.empty(32, np.float32)
        assert np.isnan(workspace).all()
    y = np.zeros(32, np.float32)
    run(write, (workspace, np.int32(31)), block=(32,))
    fault = expect(errors.UninitializedReadError, read, (workspace, y), block=(32,))
    assert fault.tid == (31, 0, 0)
    with host.check("init"), pytest.raises(errors.UninitializedReadError, match=r"1 of 32 elements.*\[31\]"):
        host.finish(workspace)


def test_init_follows_local_memory():
    code = r"""
extern "C" __global__ void k(const int* at, int* y) {
  int a[8];
  for (int i = 0; i < %d; i++) a[at[i]] = i;
  y[threadIdx.x] = a[at[threadIdx.x %% 8]];  // FAULT
}
"""
    at, y = np.arange(8, dtype=np.int32), np.zeros(32, np.int32)
    run(code % 8, (at, y), block=(32,))
    assert (y == np.arange(32) % 8).all()
    expect(errors.UninitializedReadError, code % 7, (at, y), block=(32,))


REVERSE = r"""
extern "C" __global__ void k(float* y) {
  __shared__ float s[128];
  s[threadIdx.x] = threadIdx.x;
  %s;
  y[threadIdx.x] = s[127 - threadIdx.x];  // FAULT
}
"""


def test_race_catches_a_missing_barrier_between_warps():
    y = np.zeros(128, np.float32)
    run(REVERSE % "__syncthreads()", (y,), mode="random")
    assert (y == 127 - np.arange(128)).all()
    # A warp-level synchronisation orders nothing between warps.
    with pytest.raises((errors.RaceError, errors.UninitializedReadError)):
        run(REVERSE % "__syncwarp()", (y,))


def test_race_names_both_accesses():
    y = np.zeros(128, np.float32)
    code = REVERSE % "__syncwarp()"
    with pytest.raises(errors.RaceError) as caught:
        run(code, (y,), checks=("race",))
    message = str(caught.value)
    assert line_of(code, "FAULT") in message
    assert line_of(code, "= threadIdx.x;") in message
    assert "shared memory" in message


def test_race_does_not_take_lockstep_for_synchronisation():
    code = r"""
extern "C" __global__ void k(float* y) {
  __shared__ volatile float s[32];
  s[threadIdx.x] = threadIdx.x;
  %s;
  y[threadIdx.x] = s[31 - threadIdx.x];  // FAULT
}
"""
    y = np.zeros(32, np.float32)
    run(code % "__syncwarp()", (y,), block=(32,))
    assert (y == 31 - np.arange(32)).all()
    code = code.replace("volatile ", "")
    expect(errors.RaceError, code % "", (y,), block=(32,))


def test_race_catches_a_write_after_read():
    code = r"""
extern "C" __global__ void k(float* y) {
  __shared__ float s[128];
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  float other = s[127 - threadIdx.x];
  %s;
  s[threadIdx.x] = other;  // FAULT
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}
"""
    y = np.zeros(128, np.float32)
    run(code % "__syncthreads()", (y,))
    expect(errors.RaceError, code % "", (y,))


def test_race_catches_two_ctas_that_write_one_place():
    code = r"""
extern "C" __global__ void k(float* y) {
  y[threadIdx.x %s] = blockIdx.x;  // FAULT
}
"""
    y = np.zeros(64, np.float32)
    run(code % "+ 32 * blockIdx.x", (y,), grid=(2,), block=(32,))
    expect(errors.RaceError, code % "", (y,), grid=(2,), block=(32,))


LAST_CTA = r"""
extern "C" __global__ void k(const float* x, float* partial, unsigned* ticket, float* y) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = x[blockIdx.x];
    %s;
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    float sum = 0;
    for (int i = 0; i < gridDim.x; i++) sum += __ldcg(partial + i);  // FAULT
    *y = sum;
  }
}
"""


RELEASING = r"""
extern "C" __global__ void k(float* data, unsigned* flag, float* y) {
  if (threadIdx.x != 0) return;
  unsigned before;
  if (blockIdx.x == 0) {
    *data = 5;
    asm volatile("RELEASE" : "=r"(before) : "l"(flag) : "memory");
  } else {
    asm volatile("atom.acquire.gpu.global.add.u32 %0, [%1], 0;" : "=r"(before) : "l"(flag) : "memory");
    if (before) *y = *data;  // FAULT
  }
}
"""


@pytest.mark.parametrize("order", ["release", "acq_rel"])
def test_race_knows_releasing_atomics(order):
    def launch(release):
        data, flag, y = np.zeros(1, np.float32), np.zeros(1, np.uint32), np.zeros(1, np.float32)
        kernel = host.RawModule(code=RELEASING.replace("RELEASE", release)).get_function("k")
        with host.check("all"), host.schedule("late", threads=1):  # in order: CTA 0 releases before CTA 1 looks
            kernel((2,), (32,), (data, flag, y))
        return y[0]

    assert launch(f"atom.{order}.gpu.global.add.u32 %0, [%1], 1;") == 5
    assert launch("mov.u32 %0, 0; st.release.gpu.global.u32 [%1], 1;") == 5
    with pytest.raises(errors.RaceError):
        launch("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;")


def test_race_knows_atomics_with_fences():
    x = np.arange(16, dtype=np.float32)
    for seed in range(4):
        partial, ticket, y = np.zeros(16, np.float32), np.zeros(1, np.uint32), np.zeros(1, np.float32)
        run(LAST_CTA % "__threadfence()", (x, partial, ticket, y), grid=(16,), block=(32,), mode="random", seed=seed)
        assert y[0] == x.sum()
    partial, ticket = np.zeros(16, np.float32), np.zeros(1, np.uint32)
    expect(errors.RaceError, LAST_CTA % "", (x, partial, ticket, y), grid=(16,), block=(32,))


ASYNC = (
    PTX_WRAPPERS
    + r"""
extern "C" __global__ void k(const float4* x, float* y) {
  __shared__ float4 s[2][32];
  int t = threadIdx.x;
  copy16(&s[0][t], x + t); commit();
  copy16(&s[1][t], x + 32 + t); commit();
  wait<%d>();
  %s;
  y[t] = s[0][31 - t].x + s[0][31 - t].y;  // FAULT
  wait<0>();
}
"""
)


@pytest.mark.parametrize("checks", [("mem", "init", "race"), ("race",), ("init",)])
def test_a_missing_wait_is_caught(checks):
    x, y = host.empty((64, 4), np.float32), np.zeros(32, np.float32)
    x[:] = np.arange(256).reshape(64, 4)
    host.finish(x)
    run(ASYNC % (1, "__syncthreads()"), (x, y), block=(32,), checks=checks)
    assert (y == (x[:32, 0] + x[:32, 1])[::-1]).all()
    expect(
        (errors.AsyncCopyError, errors.UninitializedReadError),
        ASYNC % (2, "__syncthreads()"),
        (x, y),
        block=(32,),
        checks=checks,
    )


def test_a_missing_wait_shows_without_any_checker():
    x, y = np.ones((64, 4), np.float32), np.zeros(32, np.float32)
    run(ASYNC % (2, "__syncthreads()"), (x, y), block=(32,), checks=())
    assert np.isnan(y).all()
    run(ASYNC % (2, "__syncthreads()"), (x, y), block=(32,), checks=(), mode="eager")
    assert (y == 2).all()


def test_an_asynchronous_copy_needs_a_barrier_for_other_threads():
    x, y = host.empty((64, 4), np.float32), np.zeros(32, np.float32)
    x[:] = 1
    host.finish(x)
    expect(errors.RaceError, ASYNC % (1, ""), (x, y), block=(32,), checks=("race",))


def test_an_asynchronous_copy_over_data_in_use_is_caught():
    code = (
        PTX_WRAPPERS
        + r"""
extern "C" __global__ void k(const float4* x, float* y) {
  __shared__ float4 s[64];
  int t = threadIdx.x;
  copy16(&s[t], x + t); commit(); wait<0>();
  __syncthreads();
  y[t] = s[63 - t].x;
  %s;
  copy16(&s[t], x + t);  // FAULT
  commit(); wait<0>();
}
"""
    )
    x, y = host.empty((64, 4), np.float32), np.zeros(64, np.float32)
    x[:] = 1
    host.finish(x)
    run(code % "__syncthreads()", (x, y), block=(64,))
    expect(errors.RaceError, code % "", (x, y), block=(64,))


def test_random_schedules_find_what_late_copies_hide():
    """Some seeds land copies early: a kernel may rely neither on early nor on late arrival."""
    x, y = np.ones((64, 4), np.float32), np.zeros(32, np.float32)
    seen = set()
    for seed in range(20):
        run(ASYNC % (2, "__syncthreads()"), (x, y), block=(32,), checks=(), mode="random", seed=seed)
        seen.add(bool(np.isnan(y).any()))
    assert seen == {True, False}


def test_a_barrier_that_some_warps_skip_is_a_deadlock():
    code = r"""
extern "C" __global__ void k(float* y) {
  if (threadIdx.x < 64) {
    asm volatile("bar.sync 1, 128;");  // FAULT
  } else {
    asm volatile("bar.sync 2, 128;");
  }
  y[threadIdx.x] = 1;
}
"""
    with pytest.raises(errors.DeadlockError, match="barrier 1") as caught:
        run(code, (np.zeros(128, np.float32),))
    assert line_of(code, "FAULT") in caught.value.location


def test_a_member_mask_that_names_absent_lanes_is_caught():
    code = r"""
extern "C" __global__ void k(int* y) {
  int v = threadIdx.x;
  if (threadIdx.x < 16) {
    v = __shfl_xor_sync(%s, v, 1);  // FAULT
  }
  __syncthreads();
  y[threadIdx.x] = v;
}
"""
    y = np.zeros(32, np.int32)
    run(code % "0xffffu", (y,), block=(32,))
    assert (y[:16] == (np.arange(16) ^ 1)).all()
    expect(errors.DivergenceError, code % "~0u", (y,), block=(32,))
