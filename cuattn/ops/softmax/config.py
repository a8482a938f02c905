"""How the softmax kernels are shaped: one row a tuned shape, and the choice among them.

A row may change the speed of a call, never its result (beyond the rounding of a sum in another order).

>>> select(num_rows=8, num_cols=100, itemsize=4).path
'onchip'
>>> select(num_rows=1, num_cols=1_000_000, itemsize=4).path
'split'
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cuattn.dtypes import PACK_BYTES

ELEMENT_TYPES = {"float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float", "float64": "double"}
ITEMSIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
ALGORITHMS = {"naive": 0, "safe": 1, "online": 2}
OUTPUTS = {"softmax": 0, "log_softmax": 1, "logsumexp": 2}

MAX_GRID_X = 2**31 - 1
MAX_GRID_Y = 65535
MAX_CHUNKS = 1024  # every CTA of the finish kernel reads the states of all chunks of its rows


@dataclass(frozen=True, slots=True)
class SoftmaxConfig:
    """One kernel shape.

    Attributes
    ----------
    path : "onchip" (rows in registers, one read), "stream" (one CTA a row) or "split" (several CTAs a row)
    num_threads : threads a CTA
    threads_per_row : of these, threads that share one row
    lanes_span_rows : the lanes of a warp hold 32 neighbouring rows instead of neighbouring columns
    packs_per_thread : 16-byte packs of a row that a thread keeps in registers ("onchip")
    min_chunk_cols : fewest columns of a row worth a CTA of their own ("split")
    max_ctas : largest grid extent over rows; CTAs beyond take turns
    """

    path: Literal["onchip", "stream", "split"]
    num_threads: int
    threads_per_row: int
    lanes_span_rows: bool = False
    packs_per_thread: int = 1
    min_chunk_cols: int = 8192
    max_ctas: int = MAX_GRID_Y

    def __post_init__(self) -> None:
        if self.num_threads % 32 or not 32 <= self.num_threads <= 1024:
            raise ValueError(f"num_threads is {self.num_threads}; multiples of 32 up to 1024 are allowed")
        allowed = {self.num_threads // 32} if self.lanes_span_rows else {1, 2, 4, 8, 16, 32, self.num_threads}
        if self.threads_per_row not in allowed or self.threads_per_row & (self.threads_per_row - 1):
            raise ValueError(f"threads_per_row is {self.threads_per_row}; powers of two in {sorted(allowed)} only")

    @property
    def rows_per_cta(self) -> int:
        return self.num_threads // self.threads_per_row

    def max_cols(self, itemsize: int) -> int:
        """The longest row that fits into the registers of its threads ("onchip")."""
        return self.threads_per_row * self.packs_per_thread * PACK_BYTES // itemsize

    def chunk_cols(self, num_cols: int) -> int:
        """Columns a CTA takes ("split"): a multiple of 16, so that chunks start where 16-byte loads may."""
        fewest = max(self.min_chunk_cols, -(-num_cols // MAX_CHUNKS))
        return -(-fewest // 16) * 16

    def row_groups(self, num_rows: int) -> int:
        return -(-num_rows // self.rows_per_cta)


# In the order of selection: the first that a row fits into.
ONCHIP = (
    SoftmaxConfig("onchip", num_threads=128, threads_per_row=8, packs_per_thread=1, max_ctas=MAX_GRID_X),
    SoftmaxConfig("onchip", num_threads=128, threads_per_row=32, packs_per_thread=2, max_ctas=MAX_GRID_X),
    SoftmaxConfig("onchip", num_threads=128, threads_per_row=128, packs_per_thread=4, max_ctas=MAX_GRID_X),
    SoftmaxConfig("onchip", num_threads=512, threads_per_row=512, packs_per_thread=4, max_ctas=MAX_GRID_X),
)
ONCHIP_LANES = (
    SoftmaxConfig(
        "onchip", num_threads=256, threads_per_row=8, lanes_span_rows=True, packs_per_thread=2, max_ctas=MAX_GRID_X
    ),
)
STREAM_SHORT = SoftmaxConfig("stream", num_threads=128, threads_per_row=32, max_ctas=MAX_GRID_X)
STREAM = SoftmaxConfig("stream", num_threads=256, threads_per_row=256, max_ctas=MAX_GRID_X)
STREAM_LANES = SoftmaxConfig("stream", num_threads=256, threads_per_row=8, lanes_span_rows=True, max_ctas=MAX_GRID_X)
SPLIT = SoftmaxConfig("split", num_threads=256, threads_per_row=256)
SPLIT_LANES = SoftmaxConfig("split", num_threads=256, threads_per_row=8, lanes_span_rows=True)

STREAM_SHORT_COLS = 1024
SPLIT_COLS = 32 * 1024  # from here on a row is worth several CTAs, if there are too few rows to fill a GPU
SPLIT_ROW_GROUPS = 256  # so few leave a GPU of 100 and more SMs waiting for memory
SPLIT_ALWAYS_COLS = 256 * 1024


def select(
    *, num_rows: int, num_cols: int, itemsize: int, algorithm: str = "online", lanes_span_rows: bool = False
) -> SoftmaxConfig:
    """Select the config for ``num_rows`` rows of ``num_cols`` elements of ``itemsize`` bytes.

    ``lanes_span_rows`` says that neighbouring rows, not neighbouring columns, are adjacent in memory.
    """
    if algorithm == "online":  # the others are defined by their reads and writes, and keep them
        for config in ONCHIP_LANES if lanes_span_rows else ONCHIP:
            if num_cols <= config.max_cols(itemsize):
                return config
    return select_streaming(num_rows=num_rows, num_cols=num_cols, lanes_span_rows=lanes_span_rows)


def select_streaming(*, num_rows: int, num_cols: int, lanes_span_rows: bool) -> SoftmaxConfig:
    """Select a config, as `select` does, for work that takes a row from memory in any case."""
    split = SPLIT_LANES if lanes_span_rows else SPLIT
    few_rows = split.row_groups(num_rows) <= SPLIT_ROW_GROUPS
    if num_cols >= SPLIT_ALWAYS_COLS or (num_cols >= SPLIT_COLS and few_rows):
        return split
    if lanes_span_rows:
        return STREAM_LANES
    return STREAM_SHORT if num_cols <= STREAM_SHORT_COLS else STREAM


def shape_constants(config: SoftmaxConfig, dtype_name: str, vectorized: bool) -> dict[str, int | bool | float | str]:
    """Return what the kernels know at compile time about the shape of their work."""
    return {
        "Element": ELEMENT_TYPES[dtype_name],
        "NUM_THREADS": config.num_threads,
        "THREADS_PER_ROW": config.threads_per_row,
        "LANES_SPAN_ROWS": config.lanes_span_rows,
        "VECTORIZED": vectorized,
    }


def kernel_constants(
    config: SoftmaxConfig, dtype_name: str, vectorized: bool, output: str, algorithm: str
) -> tuple[str, dict[str, int | bool | float | str]]:
    """Return the kernel file (without ``.cu``) for a config, and its constants."""
    constants = shape_constants(config, dtype_name, vectorized)
    constants["OUTPUT"] = OUTPUTS[output]
    if config.path == "onchip":
        constants["PACKS_PER_THREAD"] = config.packs_per_thread
        return "softmax_onchip", constants
    constants["ALGORITHM"] = ALGORITHMS[algorithm]
    return ("softmax_split" if config.path == "split" else "softmax"), constants


def variants() -> Iterator[tuple[str, dict[str, int | bool | float | str]]]:
    """List every kernel that a call can ask for: to compile ahead of time, and to look at registers and spills."""
    configs = (*ONCHIP, *ONCHIP_LANES, STREAM_SHORT, STREAM, STREAM_LANES, SPLIT, SPLIT_LANES)
    for config in configs:
        for dtype_name in ELEMENT_TYPES:
            for vectorized in (False,) if config.lanes_span_rows else (False, True):
                for algorithm in ("online",) if config.path == "onchip" else ALGORITHMS:
                    for output in OUTPUTS:
                        yield kernel_constants(config, dtype_name, vectorized, output, algorithm)
                if config.path == "stream":
                    constants = shape_constants(config, dtype_name, vectorized)
                    yield "online_softmax_state", {**constants, "ALGORITHM": ALGORITHMS["online"]}
