"""CUDA C of one-instruction kernels for bulk copies, and what their tiles look like, enumerated element by element."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np

import cuattn.host as host
from cuattn import compile

BF16 = np.dtype(ml_dtypes.bfloat16)
#: Schedules that every kernel runs under.
MODES = [("eager", 0), ("late", 0), ("random", 1), ("random", 2)]

PRELUDE = r"""
typedef unsigned long long u64;
struct alignas(64) TensorMap { u64 opaque[16]; };
__device__ __forceinline__ unsigned smem(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void mbarrier_init(u64* bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(smem(bar)), "r"(count) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void expect(u64* bar, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(smem(bar)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait(u64* bar, unsigned parity) {
  unsigned done = 0;
  while (!done)
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(smem(bar)), "r"(parity) : "memory");
}
__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait_group() {
  asm volatile("cp.async.bulk.wait_group %0;" :: "n"(N) : "memory");
}
template <int N> __device__ __forceinline__ void wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(N) : "memory");
}
__device__ __forceinline__ void bulk_load(void* to, const void* from, unsigned bytes, u64* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :: "r"(smem(to)), "l"(from), "r"(bytes), "r"(smem(bar)) : "memory");
}
__device__ __forceinline__ void bulk_store(void* to, const void* from, unsigned bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
               :: "l"(to), "r"(smem(from)), "r"(bytes) : "memory");
}
"""

_COORDINATES = "const int4 c0, const int c4"
_NAMES = ("c0.x", "c0.y", "c0.z", "c0.w", "c4")


def _tensor_operands(rank: int, first: int) -> tuple[str, str]:
    places = ", ".join(f"%{first + k}" for k in range(rank))
    return "{" + places + "}", ", ".join(f'"r"({name})' for name in _NAMES[:rank])


def tensor_load(rank: int) -> str:
    """Entry ``load<rank>``: one box to byte ``at`` of a shared buffer full of 0xAB, all of which goes to ``out``."""
    places, values = _tensor_operands(rank, 3)
    return f"""
extern "C" __global__ void load{rank}(const __grid_constant__ TensorMap map, unsigned* out, {_COORDINATES}, int at,
                                      int tile_bytes, int bytes) {{
  extern __shared__ __align__(1024) unsigned char s_tile[];
  __shared__ u64 bar;
  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) reinterpret_cast<unsigned*>(s_tile)[i] = 0xABABABABu;
  proxy_fence();
  if (threadIdx.x == 0) mbarrier_init(&bar, 1);
  __syncthreads();
  if (threadIdx.x == 0) {{
    expect(&bar, tile_bytes);
    asm volatile("cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {places}], [%2];"
                 :: "r"(smem(s_tile + at)), "l"(&map), "r"(smem(&bar)), {values} : "memory");
  }}
  wait(&bar, 0);
  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) out[i] = reinterpret_cast<unsigned*>(s_tile)[i];
}}
"""


def tensor_store(rank: int, reduction: str = "") -> str:
    """Entry ``store<rank>`` or ``<reduction><rank>``: the first ``bytes`` of ``in`` as one box."""
    places, values = _tensor_operands(rank, 2)
    base = "cp.reduce" if reduction else "cp"
    modifier = f".{reduction}" if reduction else ""
    return f"""
extern "C" __global__ void {reduction or "store"}{rank}(const __grid_constant__ TensorMap map, const unsigned* in,
                                                        {_COORDINATES}, int bytes) {{
  extern __shared__ __align__(1024) unsigned char s_tile[];
  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) reinterpret_cast<unsigned*>(s_tile)[i] = in[i];
  proxy_fence();
  __syncthreads();
  if (threadIdx.x == 0) {{
    asm volatile("{base}.async.bulk.tensor.{rank}d.global.shared::cta{modifier}.tile.bulk_group [%0, {places}], [%1];"
                 :: "l"(&map), "r"(smem(s_tile)), {values} : "memory");
    commit();
    wait_group<0>();
  }}
}}
"""


@lru_cache(maxsize=1)
def tensor_source() -> str:
    """All tensor kernels: five loads, five stores, eight reductions of two dimensions."""
    kernels = [tensor_load(rank) for rank in range(1, 6)] + [tensor_store(rank) for rank in range(1, 6)]
    kernels += [tensor_store(2, op) for op in ("add", "min", "max", "inc", "dec", "and", "or", "xor")]
    return PRELUDE + "".join(kernels)


@lru_cache(maxsize=1)
def tensor_module() -> host.RawModule:
    return host.RawModule(code=tensor_source(), arch="sm_90a")


# The 16-byte pieces of each 128-byte line of shared memory, as the CUDA programming guide draws them:
# entry [line % n][p] is the piece that stands at place p.
PIECES = {
    "none": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "32B": [[0, 1, 2, 3, 4, 5, 6, 7], [1, 0, 3, 2, 5, 4, 7, 6]],
    "64B": [[0, 1, 2, 3, 4, 5, 6, 7], [1, 0, 3, 2, 5, 4, 7, 6], [2, 3, 0, 1, 6, 7, 4, 5], [3, 2, 1, 0, 7, 6, 5, 4]],
    "128B": [
        [0, 1, 2, 3, 4, 5, 6, 7], [1, 0, 3, 2, 5, 4, 7, 6], [2, 3, 0, 1, 6, 7, 4, 5], [3, 2, 1, 0, 7, 6, 5, 4],
        [4, 5, 6, 7, 0, 1, 2, 3], [5, 4, 7, 6, 1, 0, 3, 2], [6, 7, 4, 5, 2, 3, 0, 1], [7, 6, 5, 4, 3, 2, 1, 0],
    ],
}  # fmt: skip


def swizzled(address: int, swizzle: str) -> int:
    """Where the byte that would stand at ``address`` of shared memory stands."""
    line, piece, byte = address // 128, address % 128 // 16, address % 16
    lines = PIECES[swizzle]
    return line * 128 + lines[line % len(lines)].index(piece) * 16 + byte


def elements(
    extents: tuple[int, ...], box: tuple[int, ...], steps: tuple[int, ...], start: tuple[int, ...]
) -> list[tuple[int, ...] | None]:
    """The array index (outermost first) of each element of a box in the order of shared memory; None: outside."""
    ranges = [range(0, extent, step) for extent, step in zip(box, steps, strict=True)]
    found: list[tuple[int, ...] | None] = []
    for offset in product(*reversed(ranges)):
        place = tuple(s + o for s, o in zip(reversed(start), offset, strict=True))
        inside = all(0 <= p < e for p, e in zip(place, reversed(extents), strict=True))
        found.append(place if inside else None)
    return found


def tile(
    array: np.ndarray,
    box: tuple[int, ...],
    steps: tuple[int, ...],
    start: tuple[int, ...],
    *,
    swizzle: str = "none",
    outside: bytes | None = None,
    at: int = 0,
) -> dict[int, int]:
    """Byte of shared memory → its value after a load of the box to byte ``at``."""
    size = array.itemsize
    result: dict[int, int] = {}
    for number, place in enumerate(elements(array.shape[::-1], box, steps, start)):
        data = bytes(size) if outside is None else outside
        if place is not None:
            data = array[place].tobytes()
        for k in range(size):
            result[swizzled(at + number * size + k, swizzle)] = data[k]
    return result


# ---- running


def coordinates(start: Sequence[int]) -> tuple[np.void, np.int32]:
    """The arguments ``c0`` and ``c4``."""
    c = [*start, *([0] * (5 - len(start)))]
    return np.void(np.array(c[:4], np.int32).tobytes()), np.int32(c[4])


def array_of(shape: Sequence[int] | int, dtype: Any, seed: int = 0) -> np.ndarray:
    """Random bits, at an aligned address."""
    array = host.empty(shape, dtype)
    bits = np.random.default_rng(seed).integers(0, 256, array.nbytes, dtype=np.uint8)
    array.reshape(-1).view(np.uint8)[:] = bits
    host.finish(array)
    return array


def launch(
    kernel: host.RawKernel,
    args: Sequence[object],
    *,
    smem: int = 0,
    block: int = 64,
    grid: int = 1,
    mode: str = "late",
    seed: int = 0,
    checks: Sequence[str] = ("mem", "init", "race"),
) -> None:
    if smem > 48 * 1024:
        kernel.max_dynamic_shared_size_bytes = smem
    with host.check(*checks), host.schedule(mode, seed, threads=1):
        kernel((grid,), (block,), args, shared_mem=smem)


def assembles(source: str) -> bool:
    """Whether ptxas takes every instruction: what the host executor runs must exist."""
    return bool(compile.build_source(source, name="bulk.cu", arch="sm_90a", kind="cubin").image)
