"""The instruction table: one-instruction kernels with the bits they must produce.

`families` gives the table by family. It is data for two machines: ``tests/host/test_instructions.py`` runs it on the
host executor, ``bench.gpu_check`` on a GPU, through the same three functions:

>>> from cuattn.testing import instructions
>>> cases = instructions.cases_for("integer", 80)
>>> text = instructions.module_text(cases[:2], 80)  # PTX with the kernels case_0 and case_1
>>> cells = instructions.operands(cases[0])  # uint64 [sources, threads]
>>> # launch case_0 with (cells, out, np.uint32(threads)), out uint64 zeros [destinations, threads], one thread a lane;
>>> # then instructions.mismatches(cases[0], out) lists what is wrong.
Which NaN: f32 and 16-bit arithmetic, min and max give the canonical one (0x7fffffff, 0x7fff), and so do conversions
from f32 to 16 or 8 bits and from f16 to f32. Any NaN passes where PTX leaves it open and GPUs differ: f64 arithmetic,
neg and abs, tf32, and conversions f64 to f32, f32 to f64, bf16 to f32.
"""

from __future__ import annotations

from functools import cache

from cuattn.testing.instructions import (
    approximate,
    bits,
    comparisons,
    conversions,
    floats,
    halves,
    integer,
)
from cuattn.testing.instructions.case import Case, mismatches, module_text, num_threads, operands

__all__ = ["ARCHITECTURES", "FAMILIES", "Case", "cases_for", "mismatches", "module_text", "num_threads", "operands"]

FAMILIES = {
    "integer": integer.cases,
    "bits": bits.cases,
    "comparisons": comparisons.cases,
    "floats": floats.cases,
    "approximate": approximate.cases,
    "halves": halves.cases,
    "conversions": conversions.cases,
}
ARCHITECTURES = (80, 86, 89, 90)


@cache
def family(name: str) -> tuple[Case, ...]:
    """Return all cases of a family."""
    return tuple(FAMILIES[name]())


def cases_for(name: str, arch: int) -> tuple[Case, ...]:
    """Return the cases of a family that need exactly that architecture (they run on later ones too)."""
    return tuple(case for case in family(name) if case.min_arch == arch)
