"""One wgmma with everything around it: its kernel, its operands laid out in shared memory, its result as a matrix.

Where an element lies in shared memory is worked out here from the canonical layouts of the PTX ISA, written as it
writes them: pairs of extents and strides for both axes, then a swizzle of address bits.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import ml_dtypes
import numpy as np

import cuattn.host as host

SWIZZLES = {"none": 0, "128B": 1, "64B": 2, "32B": 3}
TYPES = {
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "tf32": np.dtype(np.float32),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "s8": np.dtype(np.int8),
    "u8": np.dtype(np.uint8),
}
ACCUMULATORS = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "s32": np.dtype(np.int32)}

SMEM = 96 * 1024  # image of shared memory that a test lays out
KERNEL = r"""
extern "C" __global__ void k_%(name)s(const uint4* image, int bytes, const unsigned* a, const unsigned* d_in,
                                      unsigned* d_out, unsigned long long desc_a, unsigned long long desc_b,
                                      int scale_d) {
  extern __shared__ __align__(1024) uint4 smem[];
  for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x) smem[i] = image[i];
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  unsigned long long base = (unsigned)__cvta_generic_to_shared(smem) >> 4;
  desc_a += base;
  desc_b += base;
  unsigned d[%(nd)d], f[4];
  for (int i = 0; i < %(nd)d; i++) d[i] = d_in[threadIdx.x * %(nd)d + i];
  for (int i = 0; i < 4; i++) f[i] = a[threadIdx.x * 4 + i];
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %%%(scale)d, 0;\n%(text)s\n}" : %(outputs)s : %(inputs)s);
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < %(nd)d; i++) d_out[threadIdx.x * %(nd)d + i] = d[i];
}
"""


@dataclass(frozen=True)
class Product:
    """One wgmma: its types, n, where A comes from, both majors, the immediates."""

    a: str = "bf16"
    b: str = "bf16"
    d: str = "f32"
    n: int = 64
    registers: bool = False  # A from registers
    a_mn: bool = False
    b_mn: bool = False
    scale: tuple[int, int] = (1, 1)
    satfinite: bool = False

    @property
    def k(self) -> int:
        return 32 // TYPES[self.a].itemsize

    @property
    def num_d(self) -> int:
        return self.n // (4 if self.d == "f16" else 2)

    @property
    def name(self) -> str:
        return f"{self.d}_{self.a}_{self.b}_{self.n}"

    def source(self) -> str:
        nd = self.num_d
        regs = ", ".join(f"%{i}" for i in range(nd))
        a = "{" + ", ".join(f"%{nd + i}" for i in range(4)) + "}" if self.registers else f"%{nd}"
        b = nd + (4 if self.registers else 1)
        immediates = [] if self.d == "s32" else [str(x) for x in self.scale]
        if self.k == 16:
            immediates += ([] if self.registers else [str(int(self.a_mn))]) + [str(int(self.b_mn))]
        tail = "".join(", " + x for x in immediates)
        shape = f"m64n{self.n}k{self.k}{'.satfinite' * self.satfinite}"
        types = f"{self.d}.{self.a}.{self.b}"
        text = f"wgmma.mma_async.sync.aligned.{shape}.{types} {{{regs}}}, {a}, %{b}, p{tail};"
        inputs = [f'"r"(f[{i}])' for i in range(4)] if self.registers else ['"l"(desc_a)']
        return KERNEL % dict(
            name=self.name, nd=nd, scale=b + 1, text=text, outputs=", ".join(f'"+r"(d[{i}])' for i in range(nd)),
            inputs=", ".join([*inputs, '"l"(desc_b)', '"r"(scale_d)']),
        )  # fmt: skip


@functools.cache
def module(products: tuple[Product, ...]) -> host.RawModule:
    return host.RawModule(code="".join(p.source() for p in products), arch="sm_90a")


# ---- layouts


@dataclass(frozen=True)
class Layout:
    """Where a matrix of ``mn`` x ``k`` lies: ``start`` bytes into the image, strides as the descriptor gives them."""

    swizzle: str
    mn_major: bool
    start: int
    leading: int
    stride: int
    base_offset: int = 0

    def descriptor(self) -> int:
        fields = self.start >> 4 | self.leading >> 4 << 16 | self.stride >> 4 << 32
        return fields | self.base_offset << 49 | SWIZZLES[self.swizzle] << 62

    def offsets(self, mn: int, k: int, itemsize: int) -> np.ndarray:
        """Byte of the image for every element, [mn, k]."""
        t = 16 // itemsize  # elements in 128 bits
        lead, stride = self.leading // itemsize, self.stride // itemsize
        width = {"none": 1, "32B": 2, "64B": 4, "128B": 8}[self.swizzle]  # in units of 128 bits
        # The PTX ISA's canonical layouts in elements: (extents of mn): (strides of mn), then the same for k.
        if not self.mn_major:
            mn_part = ((8, mn // 8), (width * t, stride))
            k_part = ((t, 2), (1, lead if self.swizzle == "none" else t))
        elif self.swizzle == "none":
            mn_part = ((t, mn // t), (1, stride))
            k_part = ((8, k // 8), (t, lead))
        else:
            mn_part = ((t, width, -(-mn // (t * width))), (1, t, lead))
            k_part = ((8, k // 8), (width * t, stride))
        elements = np.add.outer(positions(*mn_part)[:mn], positions(*k_part))
        address = self.start + elements * itemsize
        pattern = (address >> 7) - self.base_offset
        return address ^ ((pattern & (width - 1)) << 4)


def positions(extents: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    """Offsets of the coordinates 0, 1, ... of a nested axis, the first extent running fastest."""
    index = np.arange(np.prod(extents))
    total = np.zeros_like(index)
    for extent, step in zip(extents, strides, strict=True):
        total += index % extent * step
        index //= extent
    return total


def layout_of(swizzle: str, mn_major: bool, mn: int, k: int, itemsize: int, start: int, gap: int = 0) -> Layout:
    """A layout without overlaps, its groups ``gap`` units further apart than need be."""
    span = {"none": 16, "32B": 32, "64B": 64, "128B": 128}[swizzle]
    block = 8 * span  # bytes of one repetition of the pattern
    if not mn_major:
        stride = block * (1 + gap)
        return Layout(swizzle, False, start, (mn // 8) * stride + 128 * gap if swizzle == "none" else 16, stride)
    if swizzle == "none":
        stride = 128 * (1 + gap)
        return Layout(swizzle, True, start, (mn * itemsize // 16) * stride, stride)
    stride = block * (1 + gap)
    return Layout(swizzle, True, start, 2 * stride, stride)


def lay_out(image: np.ndarray, matrix: np.ndarray, layout: Layout) -> None:
    places = layout.offsets(*matrix.shape, matrix.itemsize)
    assert len(np.unique(places)) == places.size
    raw = np.ascontiguousarray(matrix).view(np.uint8).reshape(*matrix.shape, matrix.itemsize)
    image[places[..., None] + np.arange(matrix.itemsize)] = raw


# ---- fragments, by the PTX ISA's figures

LANE = np.arange(128)
ROW = 16 * (LANE // 32) + LANE % 32 // 4


def accumulators(matrix: np.ndarray) -> np.ndarray:
    """[64, n] → [128 threads, registers] words."""
    n = matrix.shape[1]
    per = 4 // matrix.itemsize
    words = []
    for block, half in itertools.product(range(n // 8), range(2)):
        pair = np.stack([matrix[ROW + 8 * half, 8 * block + 2 * (LANE % 4) + e] for e in range(2)], axis=1)
        words.append(np.ascontiguousarray(pair).view(np.uint32).reshape(128, 2 // per))
    return np.ascontiguousarray(np.concatenate(words, axis=1))


def matrix_of(words: np.ndarray, n: int, dtype: np.dtype) -> np.ndarray:
    """The inverse of `accumulators`."""
    values = words.view(dtype).reshape(128, n // 8, 2, 2)
    out = np.zeros((64, n), dtype)
    for block, half, e in itertools.product(range(n // 8), range(2), range(2)):
        out[ROW + 8 * half, 8 * block + 2 * (LANE % 4) + e] = values[:, block, half, e]
    return out


def fragments(matrix: np.ndarray) -> np.ndarray:
    """A, [64, k] → [128, 4] words."""
    per = 4 // matrix.itemsize
    out = np.zeros((128, 4, per), matrix.dtype)
    for register, e in itertools.product(range(4), range(per)):
        out[:, register, e] = matrix[ROW + 8 * (register % 2), 4 * per * (register // 2) + per * (LANE % 4) + e]
    return out.reshape(128, -1).view(np.uint32).copy()


# ---- running one


def integers(rng: np.random.Generator, shape: tuple[int, ...], name: str) -> np.ndarray:
    low, high = {"u8": (0, 256), "s8": (-128, 128)}.get(name, (-3, 4))
    return rng.integers(low, high, shape).astype(TYPES[name])


def run(
    product: Product, a, b, d, layouts: tuple[Layout, Layout], *, image=None, among=None, scale_d=1,
    checks=("mem", "init", "race"), forget_base_offset=False,
):  # fmt: skip
    """``a`` [64, k], ``b`` [n, k], ``d`` [64, n] → [64, n]. ``image``: shared memory, laid out already."""
    if image is None:
        image = np.full(SMEM, 0xFF, np.uint8)
        if not product.registers:
            lay_out(image, a, layouts[0])
        lay_out(image, b, layouts[1])
    kernel = module(among or (product,)).get_function("k_" + product.name)
    kernel.max_dynamic_shared_size_bytes = SMEM
    out = np.zeros((128, product.num_d), np.uint32)
    words = fragments(a) if product.registers else np.zeros((128, 4), np.uint32)
    descriptors = [np.uint64(x.descriptor() & ~(7 << 49 if forget_base_offset else 0)) for x in layouts]
    args = (image, np.int32(SMEM), words, accumulators(d), out, *descriptors, np.int32(scale_d))
    with host.check(*checks), host.schedule("late"):
        kernel((1,), (128,), args, shared_mem=SMEM)
    return matrix_of(out, product.n, d.dtype)


def operands(product: Product, seed: int = 0):
    rng = np.random.default_rng(seed)
    a, b = integers(rng, (64, product.k), product.a), integers(rng, (product.n, product.k), product.b)
    d = rng.integers(-50, 50, (64, product.n)).astype(ACCUMULATORS[product.d])
    return a, b, d


def exact(product: Product, a, b, d) -> np.ndarray:
    sign = product.scale[0] * product.scale[1]
    return (sign * (a.astype(np.float64) @ b.astype(np.float64).T) + d.astype(np.float64)).astype(d.dtype)


def standard_layouts(product: Product, swizzles=("128B", "128B"), gap=0):
    size = TYPES[product.a].itemsize
    return (
        layout_of(swizzles[0], product.a_mn, 64, product.k, size, 0, gap),
        layout_of(swizzles[1], product.b_mn, product.n, product.k, size, 32 * 1024, gap),
    )
