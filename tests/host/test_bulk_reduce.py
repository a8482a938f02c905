"""Reductions of bulk copies: every operation and type, into global memory, other CTAs and boxes."""

from __future__ import annotations

import bulk_kernels
import numpy as np
import pytest
from bulk_kernels import BF16, MODES, PRELUDE, array_of, coordinates, launch

import cuattn.host as host
from cuattn import errors
from cuattn.runtime.tensor_map import tensor_map


def reduce_exactly(op, old, new):
    """old (op) new, element by element, in Python's numbers where NumPy has none."""
    if op == "add":
        if old.dtype == np.float32:  # documented: subnormal inputs and results count as zeros
            flush = lambda x: np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(0, x), x)  # noqa: E731
            return flush(flush(old) + flush(new)).astype(np.float32)
        if old.dtype.itemsize == 2:
            return (old.astype(np.float64) + new.astype(np.float64)).astype(np.float32).astype(old.dtype)
        return old + new
    if op in ("min", "max"):
        return np.minimum(old, new) if op == "min" else np.maximum(old, new)
    if op == "inc":
        return np.where(old >= new, 0, old + 1).astype(old.dtype)
    if op == "dec":
        return np.where((old == 0) | (old > new), new, old - 1).astype(old.dtype)
    return {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[op](old, new)


DTYPES = {
    "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64, "f32": np.float32, "f64": np.float64,
    "f16": np.float16, "bf16": BF16, "b32": np.uint32, "b64": np.uint64,
}  # fmt: skip
# PTX ISA, cp.reduce.async.bulk: operations and element types
GLOBAL_REDUCTIONS = {
    "add": ("u32", "s32", "u64", "f32", "f64", "f16", "bf16"), "min": ("u32", "s32", "u64", "s64", "f16", "bf16"),
    "max": ("u32", "s32", "u64", "s64", "f16", "bf16"), "inc": ("u32",), "dec": ("u32",), "and": ("b32", "b64"),
    "or": ("b32", "b64"), "xor": ("b32", "b64"),
}  # fmt: skip
SHARED_REDUCTIONS = {
    "add": ("u32", "s32", "u64"), "min": ("u32", "s32"), "max": ("u32", "s32"), "inc": ("u32",), "dec": ("u32",),
    "and": ("b32",), "or": ("b32",), "xor": ("b32",),
}  # fmt: skip


def operands_of(type_name, count=64):
    """Two arrays with small and extreme values, many of them equal."""
    dtype = np.dtype(DTYPES[type_name])
    rng = np.random.default_rng(7)
    if dtype.kind in "iu":
        values = rng.integers(-5 if dtype.kind == "i" else 0, 6, (2, count)).astype(dtype)
        values[:, :4] = [[np.iinfo(dtype).max, np.iinfo(dtype).min, 0, 1], [1, 1, np.iinfo(dtype).max, 0]]
    else:
        values = rng.standard_normal((2, count)).astype(dtype)
        values[:, :4] = np.array([[1e-39, -0.0, 3.0, 6e-8], [1e-39, -0.0, -3.0, 6e-8]]).astype(dtype)
    arrays = []
    for row in values:
        array = host.empty(count, dtype)
        array[:] = row
        host.finish(array)
        arrays.append(array)
    return arrays


def reduction_suffix(op, type_name):
    return f"{op}.noftz.{type_name}" if op == "add" and type_name in ("f16", "bf16") else f"{op}.{type_name}"


def global_reduction(op, type_name):
    return f"""
extern "C" __global__ void global_{op}_{type_name}(unsigned char* to, const unsigned* from, int bytes) {{
  extern __shared__ __align__(128) unsigned char s_data[];
  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) reinterpret_cast<unsigned*>(s_data)[i] = from[i];
  proxy_fence();
  __syncthreads();
  if (threadIdx.x == 0) {{
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.{reduction_suffix(op, type_name)} [%0], [%1], %2;"
                 :: "l"(to), "r"(smem(s_data)), "r"(bytes) : "memory");
    commit();
    wait_group<0>();
  }}
}}
"""


def shared_reduction(op, type_name):
    """CTA 0 of a cluster of two sends its data to CTA 1, which holds the old values and writes the result."""
    return f"""
extern "C" __global__ void __cluster_dims__(2, 1, 1)
shared_{op}_{type_name}(unsigned* old, const unsigned* from, int bytes) {{
  extern __shared__ __align__(128) unsigned char s_data[];
  __shared__ u64 bar;
  unsigned rank = blockIdx.x, remote, remote_bar;
  const unsigned* mine = rank ? old : from;
  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) reinterpret_cast<unsigned*>(s_data)[i] = mine[i];
  proxy_fence();
  if (threadIdx.x == 0) {{
    mbarrier_init(&bar, 1);
    expect(&bar, rank ? bytes : 0);
  }}
  __syncthreads();
  asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
  if (rank == 0 && threadIdx.x == 0) {{
    asm volatile("mapa.shared::cluster.u32 %0, %1, 1;" : "=r"(remote) : "r"(smem(s_data)));
    asm volatile("mapa.shared::cluster.u32 %0, %1, 1;" : "=r"(remote_bar) : "r"(smem(&bar)));
    asm volatile("cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.{op}.{type_name}"
                 " [%0], [%1], %2, [%3];"
                 :: "r"(remote), "r"(smem(s_data)), "r"(bytes), "r"(remote_bar) : "memory");
  }}
  if (rank == 1) {{
    wait(&bar, 0);
    for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) old[i] = reinterpret_cast<unsigned*>(s_data)[i];
  }}
  asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}}
"""


REDUCTION_SOURCE = PRELUDE + "".join(
    [global_reduction(op, t) for op, types in GLOBAL_REDUCTIONS.items() for t in types]
    + [shared_reduction(op, t) for op, types in SHARED_REDUCTIONS.items() for t in types]
)


@pytest.fixture(scope="module")
def reductions():
    return host.RawModule(code=REDUCTION_SOURCE, arch="sm_90a")


@pytest.mark.parametrize("op", GLOBAL_REDUCTIONS)
def test_reductions_into_global_memory(reductions, op):
    for number, type_name in enumerate(GLOBAL_REDUCTIONS[op]):
        old, new = operands_of(type_name)
        expected = reduce_exactly(op, old.copy(), new)
        kernel = reductions.get_function(f"global_{op}_{type_name}")
        mode, seed = MODES[number % len(MODES)]
        launch(kernel, (old, new, np.int32(new.nbytes)), smem=new.nbytes, mode=mode, seed=seed)
        assert old.tobytes() == expected.tobytes(), type_name


@pytest.mark.parametrize("op", SHARED_REDUCTIONS)
def test_reductions_into_the_shared_memory_of_another_cta(reductions, op):
    for number, type_name in enumerate(SHARED_REDUCTIONS[op]):
        old, new = operands_of(type_name)
        expected = reduce_exactly(op, old.copy(), new)
        kernel = reductions.get_function(f"shared_{op}_{type_name}")
        mode, seed = MODES[number % len(MODES)]
        launch(kernel, (old, new, np.int32(new.nbytes)), smem=new.nbytes, grid=2, mode=mode, seed=seed)
        assert old.tobytes() == expected.tobytes(), type_name


@pytest.mark.parametrize("op", GLOBAL_REDUCTIONS)
def test_tensor_reductions_take_their_type_from_the_map(op):
    kernel = bulk_kernels.tensor_module().get_function(f"{op}2")
    for type_name in GLOBAL_REDUCTIONS[op]:
        old, new = (x.reshape(4, 16) for x in operands_of(type_name))
        expected = old.copy()
        expected[1:4, 8:16] = reduce_exactly(op, old[1:4, 8:16], new.reshape(8, 8)[:3])
        described = tensor_map(old, (8, 8))
        args = (described, new.reshape(-1).view(np.uint32), *coordinates((8, 1)), np.int32(described.box_bytes))
        launch(kernel, args, smem=described.box_bytes)
        assert old.tobytes() == expected.tobytes(), type_name


def test_a_tensor_reduction_that_the_type_does_not_have():
    described = tensor_map(array_of((8, 16), np.float32), (8, 8))
    kernel = bulk_kernels.tensor_module().get_function("max2")
    with pytest.raises(errors.MemoryFaultError, match="has no such reduction"):
        launch(kernel, (described, np.zeros(64, np.uint32), *coordinates((0, 0)), np.int32(256)), smem=256)


def test_reductions_of_many_ctas_meet(reductions):
    total = host.empty(64, np.float32)
    total[:] = 0
    host.finish(total)
    new = np.arange(64, dtype=np.float32)
    for threads, mode in ((2, "eager"), (1, "random")):
        total[:] = 0
        with host.check("all"), host.schedule(mode, 3, threads=threads):
            reductions.get_function("global_add_f32")((16,), (32,), (total, new, np.int32(256)), shared_mem=256)
        assert (total == 16 * new).all()


def test_the_assembler_takes_every_form():
    assert bulk_kernels.assembles(REDUCTION_SOURCE)
