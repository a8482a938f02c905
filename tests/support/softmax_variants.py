"""The kernel variants that the softmax tests run, a fixed few of the many: each is compiled once and then reused.

Every config of the table, every dtype, output, algorithm and way to load occurs, and most pairs of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from cuattn.ops.softmax import config as softmax_config
from cuattn.ops.softmax.config import ONCHIP, ONCHIP_LANES, PACK_BYTES, SoftmaxConfig
from cuattn.testing.arrays import Layout
from cuattn.testing.strategies import AWKWARD_SEQLENS, VALUE_KINDS, fill

CONFIGS = {
    "onchip_8": ONCHIP[0],
    "onchip_32": ONCHIP[1],
    "onchip_128": ONCHIP[2],
    "onchip_512": ONCHIP[3],
    "onchip_lanes": ONCHIP_LANES[0],
    "stream_short": softmax_config.STREAM_SHORT,
    "stream": softmax_config.STREAM,
    "stream_lanes": softmax_config.STREAM_LANES,
    "split": softmax_config.SPLIT,
    "split_lanes": softmax_config.SPLIT_LANES,
}
F16, BF16, F32, F64 = (np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))


@dataclass(frozen=True)
class Variant:
    """One compiled kernel: a config, what it computes, and whether it loads 16 bytes at a time."""

    config_name: str
    dtype: np.dtype[Any]
    output: str
    algorithm: str
    vectorized: bool

    @property
    def config(self) -> SoftmaxConfig:
        return CONFIGS[self.config_name]

    @property
    def pack(self) -> int:
        """Elements that a thread takes at once."""
        return PACK_BYTES // self.dtype.itemsize

    def __str__(self) -> str:
        loads = "vector" if self.vectorized else "element"
        return f"{self.config_name}-{self.dtype}-{self.output}-{self.algorithm}-{loads}"


VARIANTS = tuple(
    Variant(config, dtype, output, algorithm, loads == "vector")
    for config, dtype, output, algorithm, loads in (
        ("onchip_8", F32, "softmax", "online", "element"),
        ("onchip_8", F16, "softmax", "online", "vector"),
        ("onchip_8", F64, "logsumexp", "online", "vector"),
        ("onchip_32", F32, "softmax", "online", "vector"),
        ("onchip_32", BF16, "log_softmax", "online", "element"),
        ("onchip_128", F32, "logsumexp", "online", "vector"),
        ("onchip_128", F32, "softmax", "online", "vector"),
        ("onchip_512", F16, "log_softmax", "online", "vector"),
        ("onchip_512", F32, "softmax", "online", "vector"),
        ("onchip_lanes", F32, "softmax", "online", "element"),
        ("onchip_lanes", F64, "log_softmax", "online", "element"),
        ("stream_short", F32, "softmax", "naive", "vector"),
        ("stream_short", F32, "softmax", "safe", "vector"),
        ("stream_short", F32, "softmax", "online", "element"),
        ("stream", F32, "softmax", "naive", "vector"),
        ("stream", F32, "softmax", "safe", "vector"),
        ("stream", F32, "softmax", "online", "vector"),
        ("stream", BF16, "log_softmax", "online", "vector"),
        ("stream", F16, "softmax", "safe", "element"),
        ("stream", F32, "logsumexp", "safe", "vector"),
        ("stream_lanes", F32, "softmax", "safe", "element"),
        ("stream_lanes", F16, "logsumexp", "online", "element"),
        ("split", F32, "softmax", "online", "vector"),
        ("split", F64, "softmax", "naive", "vector"),
        ("split", F16, "log_softmax", "safe", "element"),
        ("split", F32, "logsumexp", "online", "vector"),
        ("split_lanes", F32, "softmax", "online", "element"),
        ("split_lanes", BF16, "logsumexp", "online", "element"),
    )
)


@dataclass(frozen=True)
class Problem:
    """Values, the axis, where they and the result lie, and the config with its limits made small."""

    values: NDArray[Any]
    axis: int
    layout: Layout
    out_layout: Layout
    config: SoftmaxConfig


@st.composite
def problems(draw: st.DrawFn, variant: Variant) -> Problem:
    """Problems that reach exactly this variant; the awkward sizes of its config first."""
    config = replace(
        variant.config,
        min_chunk_cols=draw(st.sampled_from((16, 48, 1040))),
        max_ctas=draw(st.sampled_from((1, 2, variant.config.max_ctas))),  # one CTA takes several turns
    )
    num_cols = draw(_num_cols(config, variant))
    most = max(1, 6000 // num_cols)
    if config.lanes_span_rows:
        num_lanes = draw(st.sampled_from([n for n in (8, 9, 31, 32, 33) if n <= max(8, most)]))
        shape: tuple[int, ...] = (draw(st.sampled_from((1, 2))), num_cols, num_lanes)
        axis = 1
    else:
        group = config.rows_per_cta
        num_rows = draw(st.sampled_from([n for n in (1, 2, 3, group - 1, group + 1, 2 * group) if 0 < n <= most]))
        shape = (num_rows, num_cols)
        axis = draw(st.sampled_from((1, -1)))
    values = draw(_values(variant, shape, axis))
    return Problem(values, axis, draw(_layouts(variant, shape)), draw(_layouts(variant, shape)), config)


def _num_cols(config: SoftmaxConfig, variant: Variant) -> st.SearchStrategy[int]:
    tile = config.threads_per_row * variant.pack
    most = config.max_cols(variant.dtype.itemsize) if config.path == "onchip" else 3 * tile + 5
    around = [tile - 1, tile, tile + 1, 2 * tile, most - 1, most]
    awkward = [n for n in (*AWKWARD_SEQLENS, *around) if 1 <= n <= min(most, 6000)]
    return st.one_of(st.sampled_from(sorted(set(awkward))), st.integers(1, min(most, 6000)))


@st.composite
def _values(draw: st.DrawFn, variant: Variant, shape: tuple[int, ...], axis: int) -> NDArray[Any]:
    naive = variant.algorithm == "naive"
    kinds = [kind for kind in VALUE_KINDS if not (naive and kind in ("huge_logit", "wide"))]  # those overflow it
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = fill(shape, variant.dtype, draw(st.sampled_from(kinds)), rng)
    special = draw(st.sampled_from(("none", "-inf", "inf", "nan")))
    if special != "none":
        x[rng.random(shape) < 0.2] = -np.inf
        rows = np.moveaxis(x, axis, -1)  # a view
        rows[rng.random(rows.shape[:-1]) < 0.3] = -np.inf
        if special != "-inf" and not naive:  # naive leaves the rest of the row alone: tested by itself
            x[rng.random(shape) < 0.3 / shape[axis]] = float(special)
    return x


def _layouts(variant: Variant, shape: tuple[int, ...]) -> st.SearchStrategy[Layout]:
    """Layouts with padded rows; for a vectorized variant all rows begin at multiples of 16 bytes, else not all do."""
    if variant.config.lanes_span_rows:
        return st.sampled_from([Layout(), Layout(pad=(1, 2, 3), offset=1)])
    if variant.vectorized:
        fill_up = -shape[-1] % variant.pack
        return st.sampled_from([Layout(pad=(0, fill_up + n * variant.pack), offset=n * variant.pack) for n in (0, 1)])
    return st.sampled_from([Layout(offset=1), Layout(pad=(1, 3), offset=1)])
