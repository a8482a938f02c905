"""What a family of kernels says about itself, once: `KernelGroup`. Inspection, measuring, mutants and docs read that.

Each family declares its groups in a module ``kernels``; `cuattn.catalogue` lists these modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ARCHS", "CHUNKED_KEYS", "EXTREME_LOGITS", "ODD_STRIDES", "TYPICAL_DTYPE", "KernelGroup", "Variant", "named"]

#: The architectures that no row may spill on.
ARCHS = ("sm_80", "sm_90a")
#: Bytes of an element to the dtype that stands for all of that size.
TYPICAL_DTYPE = {2: "float16", 4: "float32", 8: "float64"}
#: Tests of many families.
ODD_STRIDES, EXTREME_LOGITS = "operations/test_odd_strides.py", "operations/test_extreme_logits.py"
CHUNKED_KEYS = "operations/test_chunk.py"


@dataclass(frozen=True, slots=True, eq=False)
class Variant:
    """A kernel with the constants that some call compiles it with."""

    kernel: str  # a file of cuattn/kernels, without .cu
    row: str  # what tells it from the kernel's other variants
    constants: Mapping[str, Any]
    arch: str = ""  # the one architecture that it is for; empty: any
    num_threads: int = 0  # of a CTA; 0 where nothing is said about its launch
    smem_bytes: int = 0  # of dynamic shared memory
    nvrtc_ms: int | None = None  # what its compilation may take

    @property
    def name(self) -> str:
        """The name that `inspect` takes."""
        return f"{self.kernel}/{self.row}"

    @property
    def label(self) -> str:
        """The name that results of measurements are stored under."""
        return f"{self.kernel}_{self.row}"


@dataclass(frozen=True, slots=True, eq=False)
class KernelGroup:
    """Kernels that are tested and described together."""

    name: str
    kernels: tuple[str, ...]  # files of cuattn/kernels, without .cu
    variants: Callable[[], Iterable[Variant]]  # of each of the kernels: a row of a table, else what calls ask for
    tests: tuple[str, ...]  # files, or folders of files, below tests/
    page: str  # of docs/kernels


def named(kernel: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Variant]:
    """Return variants whose constants are their names."""
    for constants in rows:
        words = (str(value).removeprefix("struct ").strip("_").lower() for value in constants.values())
        yield Variant(kernel, "_".join(words), constants)
