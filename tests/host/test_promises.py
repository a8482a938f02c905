"""What works by luck on a CPU and not on a GPU: alignment that nobody promised, words that hardware does not know.

Every kernel is there twice, wrong and right.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from async_wrappers import WRAPPERS
from bulk_kernels import array_of

from cuattn import errors, host
from cuattn.runtime.tensor_map import tensor_map

SOURCE = (
    WRAPPERS
    + r"""
struct alignas(64) Map { u64 opaque[16]; };
struct LooseMap { u64 opaque[16]; };

DEVICE void tensor_load(u32 to, const void* map, u32 b) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %2}], [%3];"
               :: "r"(to), "l"(map), "r"(0), "r"(b) : "memory");
}
DEVICE void copy_out(u32* out, const void* from) {
  for (int i = threadIdx.x; i < 256; i += blockDim.x) out[i] = static_cast<const u32*>(from)[i];
}

// who: 0 nobody, 1 the thread that initialises, 2 another one, 3 another one by a fence of the proxy
extern "C" __global__ void init_fence(u32* out, const u32* in, int who) {
  __shared__ alignas(16) u32 data[256];
  __shared__ alignas(8) u64 bar;
  if (threadIdx.x == 0) init(smem(&bar), 1);
  if (who == 1 && threadIdx.x == 0) fence_init();
  __syncthreads();
  if (who == 2 && threadIdx.x == 32) fence_init();
  if (who == 3 && threadIdx.x == 32) proxy_fence();
  __syncthreads();
  if (threadIdx.x == 0) { arrive_expect(smem(&bar), 1024); bulk_load(smem(data), in, 1024, smem(&bar)); }
  wait(smem(&bar), 0);
  copy_out(out, data);
}

// how: 0 a bulk load, 1 a load and a store
extern "C" __global__ void policy(u32* out, const u32* in, u64 word, int how) {
  __shared__ alignas(16) u32 data[256];
  __shared__ alignas(8) u64 bar;
  if (how == 1) {
    u32 value;
    asm volatile("ld.global.L2::cache_hint.u32 %0, [%1], %2;"
                 : "=r"(value) : "l"(in + threadIdx.x), "l"(word) : "memory");
    asm volatile("st.global.L2::cache_hint.u32 [%0], %1, %2;"
                 :: "l"(out + threadIdx.x), "r"(value), "l"(word) : "memory");
    return;
  }
  if (threadIdx.x == 0) {
    init(smem(&bar), 1);
    fence_init();
    arrive_expect(smem(&bar), 1024);
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
                 " [%0], [%1], 1024, [%2], %3;"
                 :: "r"(smem(data)), "l"(in), "r"(smem(&bar)), "l"(word) : "memory");
  }
  __syncthreads();
  wait(smem(&bar), 0);
  copy_out(out, data);
}

template <typename M> DEVICE void load_tile(u32* out, const M& map, unsigned char* tile) {
  __shared__ alignas(8) u64 bar;
  if (threadIdx.x == 0) {
    init(smem(&bar), 1);
    fence_init();
    arrive_expect(smem(&bar), 1024);
    tensor_load(smem(tile), &map, smem(&bar));
  }
  __syncthreads();
  wait(smem(&bar), 0);
  copy_out(out, tile);
}
extern "C" __global__ void map_1024(u32* out, const __grid_constant__ Map map) {
  extern __shared__ __align__(1024) unsigned char s_tile[];
  load_tile(out, map, s_tile);
}
extern "C" __global__ void map_loose(u32* out, const __grid_constant__ LooseMap map) {
  extern __shared__ __align__(1024) unsigned char s_tile[];
  load_tile(out, map, s_tile);
}

// what: 0 the map, 1 an array, 2 a stretch of the array, 3 one that is longer than it
extern "C" __global__ void prefetch(const u32* in, const __grid_constant__ Map map, int what) {
  if (threadIdx.x != 0) return;
  if (what == 0) asm volatile("prefetch.tensormap [%0];" :: "l"(&map) : "memory");
  if (what == 1) asm volatile("prefetch.tensormap [%0];" :: "l"(in) : "memory");
  u32 bytes = what == 2 ? 1024 : 1040;
  if (what >= 2) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(in), "r"(bytes) : "memory");
}
"""
)
# A dynamic array has one alignment in a module: the tile that is not aligned enough has a module of its own.
SIXTEEN = SOURCE.replace("__align__(1024)", "__align__(16)")


@cache
def module(source: str) -> host.RawModule:
    return host.RawModule(code=source, arch="sm_90a")


def launch(name: str, *args: object, source: str = SOURCE) -> None:
    with host.check("mem", "init", "race"), host.schedule("late"):
        module(source).get_function(name)((1,), (64,), args, shared_mem=1024 if name.startswith("map") else 0)


def arrays() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(256, np.uint32), array_of(256, np.uint32)


@pytest.mark.parametrize("who", range(4))
def test_a_copy_sees_an_mbarrier_only_after_a_fence(who: int) -> None:
    out, values = arrays()
    if who in (1, 3):
        launch("init_fence", out, values, np.int32(who))
        np.testing.assert_array_equal(out, values)
        return
    with pytest.raises(errors.AsyncCopyError, match=r"no fence.mbarrier_init by the thread that initialised it"):
        launch("init_fence", out, values, np.int32(who))


@pytest.mark.parametrize("how", range(2))
def test_a_cache_policy_is_one_that_hardware_knows(how: int) -> None:
    out, values = arrays()
    for word in (0x10F0 << 48, 0x12F0 << 48, 0x14F0 << 48, 0x16F0 << 48):
        launch("policy", out, values, np.uint64(word), np.int32(how))
        np.testing.assert_array_equal(out[:64], values[:64])
    for word in (0, 1, 0x12F0, 0x12F << 48, 0x13F0 << 48, (0x12F0 << 48) + 1, 2**64 - 1):
        with pytest.raises(errors.MemoryFaultError, match=f"{word:#x} is no cache policy"):
            launch("policy", out, values, np.uint64(word), np.int32(how))


def test_dynamic_shared_memory_is_aligned_as_it_is_declared_and_no_better() -> None:
    out, values = arrays()
    described = tensor_map(values.reshape(8, 32), (32, 8), swizzle="128B")
    launch("map_1024", out, described)
    assert sorted(out) == sorted(values)
    with pytest.raises(errors.MemoryFaultError, match="which is not a multiple of 128"):
        launch("map_1024", out, described, source=SIXTEEN)


def test_a_tensor_map_is_aligned_as_its_type_is_declared_and_no_better() -> None:
    out, values = arrays()
    with pytest.raises(errors.MemoryFaultError, match="is not the address of a tensor map: a multiple of 64"):
        launch("map_loose", out, tensor_map(values.reshape(8, 32), (32, 8), swizzle="128B"))


def test_what_is_prefetched_is_there() -> None:
    _, values = arrays()
    described = tensor_map(values.reshape(8, 32), (32, 8), swizzle="128B")
    launch("prefetch", values, described, np.int32(0))
    launch("prefetch", values, described, np.int32(2))
    with pytest.raises(errors.MemoryFaultError, match="there is no tensor map at"):
        launch("prefetch", values, described, np.int32(1))
    with pytest.raises(errors.MemoryFaultError, match=r"1040-byte read at .* which is in no argument array"):
        launch("prefetch", values, described, np.int32(3))
