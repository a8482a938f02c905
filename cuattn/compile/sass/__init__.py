"""The machine code of a compiled kernel (SASS): how many instructions of which kind its loops have, and how fast that
could be at best.

It is a proof that needs no GPU: matrix products are on the tensor cores, nothing is spilled, and no unit other than the
one that should limit the kernel does. `inspect` gives a report for each kernel of a CUBIN. It runs ``nvdisasm``.

Examples
--------
>>> from cuattn import compile
>>> from cuattn.compile import sass
>>> text = 'extern "C" __global__ void scale(float* x) { x[threadIdx.x] = fmaf(x[threadIdx.x], 2.0f, 1.0f); }'
>>> binary = compile.build_source(text, name="scale.cu", arch="sm_90a", kind="cubin")
>>> report = sass.inspect(binary)["scale"]
>>> report.looped, report.main.counts["ffma"], report.local_accesses
(False, 1, 0)
"""

from __future__ import annotations

from cuattn.compile.sass.bound import CLOCK_GHZ, NUM_SMS, Bound
from cuattn.compile.sass.nvdisasm import disassemble
from cuattn.compile.sass.report import KernelReport, LoopReport, inspect

__all__ = ["CLOCK_GHZ", "NUM_SMS", "Bound", "KernelReport", "LoopReport", "disassemble", "inspect"]
