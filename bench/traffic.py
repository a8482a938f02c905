"""Bytes that the kernels move, counted by the host executor, beside what the theory pages say they move.

    python -m bench.traffic            print the tables
    python -m bench.traffic --write    put them into docs/theory/

What is counted are the bytes that the active lanes of a kernel ask global memory for. How many of them a GPU's caches
answer is not known here. The figures depend on shapes and tile shapes only, not on values, machine or time.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

import cuattn
from cuattn import host
from cuattn.estimate import attention_traffic
from cuattn.head_dims import BUCKETS
from cuattn.ops.attention.forward.config import FlashFwdConfig, PlainFwdConfig, select
from cuattn.ops.softmax.config import select as select_softmax
from cuattn.runtime.executor import executor_for
from cuattn.testing import kernels

THEORY = Path(__file__).resolve().parents[1] / "docs/theory"
STANDARD_TILE = 16  # of the two products in attention_standard.cu

# Reads of the array before the pass that writes the result, which reads it once more.
SOFTMAX_STATE_READS = {"naive": 1, "safe": 2, "online": 1}
SOFTMAX_SHAPES = ((64, 1024), (8, 30_000), (2, 200_000))

HEADS, SEQLEN, HEAD_DIM = 2, 512, 64
LSE_BYTES = HEADS * SEQLEN * 4


@dataclass(frozen=True)
class Row:
    """One kernel on one problem: bytes read and written by the formula, and as counted."""

    name: str
    problem: str
    formula: tuple[int, int]
    counted: tuple[int, int]

    def cells(self) -> list[str]:
        figures = [f"{value:,}" for pair in zip(self.formula, self.counted, strict=True) for value in pair]
        return [self.name, self.problem, *figures]


def count(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes that the kernels launched by `call` read from and write to global memory."""
    with host.profile() as profile:
        call()
    return profile.bytes["global"]["read"], profile.bytes["global"]["write"]


def softmax_rows() -> list[Row]:
    """Rows of every algorithm on a short, a long and a very long row, float32."""
    rows = []
    for shape in SOFTMAX_SHAPES:
        x = np.zeros(shape, np.float32)
        for algorithm, state_reads in SOFTMAX_STATE_READS.items():
            config = select_softmax(num_rows=shape[0], num_cols=shape[1], itemsize=4, algorithm=algorithm)
            reads, writes, place = state_reads + 1, 1, "one CTA a row"
            formula = reads * x.nbytes, writes * x.nbytes
            if config.path == "onchip":
                formula, place = (x.nbytes, x.nbytes), "row kept on chip"
            elif config.path == "split":
                # Each CTA writes the maximum and the sum of its chunk, and then reads those of all chunks of its row.
                chunks = -(-shape[1] // config.chunk_cols(shape[1]))
                states = shape[0] * chunks * 8
                formula = formula[0] + chunks * states, formula[1] + states
                place = f"{chunks} CTAs a row"
            counted = count(lambda x=x, algorithm=algorithm: cuattn.softmax(x, algorithm=algorithm))  # type: ignore[misc]
            rows.append(Row(f"{algorithm}, {place}", f"{shape[0]} × {shape[1]}", formula, counted))
    return rows


def tiled_formula(config: FlashFwdConfig | PlainFwdConfig, itemsize: int, causal: bool) -> tuple[int, int]:
    """Bytes of tiled attention: Q once, visible keys and values once for each block of queries; out and lse once."""
    # A warp of the plain kernel has a query of its own, and reads the keys of this query alone.
    block_m = config.block_m if isinstance(config, FlashFwdConfig) else 1
    moved = attention_traffic(SEQLEN, SEQLEN, HEAD_DIM, HEAD_DIM, itemsize, block_m, causal=causal, lse_bytes=4)
    written = HEADS * SEQLEN * HEAD_DIM * itemsize + LSE_BYTES
    return HEADS * moved.flash - written, written


def standard_formula(itemsize: int) -> tuple[int, int]:
    """Bytes of three kernels: logits are float32, and tiles of the two products read operands again and again."""
    square = HEADS * SEQLEN * SEQLEN
    array = HEADS * SEQLEN * HEAD_DIM * itemsize
    row_tiles, col_tiles = SEQLEN // STANDARD_TILE, HEAD_DIM // STANDARD_TILE
    scores = 2 * array * row_tiles
    softmax = 3 * square * 4  # for the maximum, for the sum, for the result
    output = square * itemsize * col_tiles + array * row_tiles
    return scores + softmax + output, square * 4 + square * itemsize + LSE_BYTES + array


def attention_rows() -> list[Row]:
    """Rows of the fused, the plain and the unfused kernels, all on the same problem."""
    rows = []
    bucket = BUCKETS[HEAD_DIM]
    for dtype in (np.dtype(np.float16), np.dtype(np.float32)):
        q = np.zeros((1, SEQLEN, HEADS, HEAD_DIM), dtype)
        limit = executor_for(q=q).smem_limit_bytes
        fused = select(dtype, bucket, bucket, seqlen_q=SEQLEN, smem_limit_bytes=limit)
        configs: dict[str, FlashFwdConfig | PlainFwdConfig] = {
            f"fused, {fused.block_m} × {fused.block_n}": fused,
            "plain, one query a warp": PlainFwdConfig(),
        }
        for causal in (False, True):
            problem = f"{dtype.name}{', causal' if causal else ''}"
            for name, config in configs.items():
                counted = count(
                    lambda q=q, causal=causal, config=config: kernels.attention(  # type: ignore[misc]
                        q, q, q, causal=causal, return_lse=True, config=config
                    )
                )
                rows.append(Row(name, problem, tiled_formula(config, dtype.itemsize, causal), counted))
            if not causal:
                counted = count(lambda q=q: cuattn.standard_attention(q, q, q))  # type: ignore[misc]
                rows.append(Row("standard, three kernels", problem, standard_formula(dtype.itemsize), counted))
    return rows


WORK_SEQLENS = (1024, 2048, 4096)
# Left and right side of a window; None is no bound.
WORK_BANDS: dict[str, tuple[int | None, int | None]] = {
    "everything": (None, None),
    "causal": (None, 0),
    "causal, window of 256": (256, 0),
    "window of 64 on both sides": (64, 64),
}


def visited_tiles(config: FlashFwdConfig, seqlen: int, band: tuple[int | None, int | None]) -> int:
    """Key tiles that the blocks of queries of one head visit, for N = M."""
    left, right = band
    tiles = 0
    for first in range(0, seqlen, config.block_m):
        last = min(first + config.block_m, seqlen) - 1
        begin = 0 if left is None else max(0, first - left)
        end = seqlen if right is None else min(seqlen, last + right + 1)
        tiles += -(-end // config.block_n) - begin // config.block_n
    return tiles


def work_table() -> str:
    """Table of tiles by the formula and as counted by bytes of keys and values, and multiplications on tensor cores."""
    lines = ["| visible | N = M | tiles: formula | counted | of all | warp instructions `mma` |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for name, band in WORK_BANDS.items():
        for seqlen in WORK_SEQLENS:
            config, counted, products = count_tiles(seqlen, band)
            tiles = visited_tiles(config, seqlen, band)
            part = counted / ((seqlen // config.block_m) * (seqlen // config.block_n))
            lines.append(f"| {name} | {seqlen} | {tiles:,} | {counted:,} | {100 * part:.1f} % | {products:,} |")
    return "\n".join(lines)


def count_tiles(seqlen: int, band: tuple[int | None, int | None]) -> tuple[FlashFwdConfig, int, int]:
    """The config, the tiles whose keys and values the float16 kernel reads, and the mma that it executes."""
    q = np.zeros((1, seqlen, 1, HEAD_DIM), np.float16)
    limit = executor_for(q=q).smem_limit_bytes
    config = select(q.dtype, BUCKETS[HEAD_DIM], BUCKETS[HEAD_DIM], seqlen_q=seqlen, smem_limit_bytes=limit)
    with host.profile() as profile:
        cuattn.attention(q, q, q, window=None if band == (None, None) else band)
    read = profile.bytes["global"]["read"] - q.nbytes
    return config, read // (2 * config.block_n * HEAD_DIM * q.itemsize), profile.instructions["mma"]


def table(rows: list[Row]) -> str:
    """Return a Markdown table, figures in bytes."""
    header = ["kernel", "problem", "bytes read: formula", "counted", "bytes written: formula", "counted"]
    lines = [header, ["---", "---", "---:", "---:", "---:", "---:"], *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables() -> dict[str, str]:
    """The tables by the names of their markers in the documentation."""
    return {"softmax": table(softmax_rows()), "attention": table(attention_rows()), "work": work_table()}


PAGES = {
    "softmax": THEORY / "online-softmax.md",
    "attention": THEORY / "tiled-attention.md",
    "work": THEORY / "tiled-attention.md",
}


def with_table(page: str, name: str, text: str) -> str:
    """`page` with `text` between its two markers."""
    pattern = re.compile(rf"(<!-- traffic:{name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(page):
        raise click.ClickException(f"the page has no markers for the table {name!r}")
    return pattern.sub(lambda match: f"{match[1]}{text}\n{match[2]}", page)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--write", is_flag=True, help="Put the tables into the theory pages.")
def main(write: bool) -> None:
    """Count the memory traffic of the softmax and attention kernels on the host executor."""
    for name, text in tables().items():
        if write:
            PAGES[name].write_text(with_table(PAGES[name].read_text(encoding="utf-8"), name, text), encoding="utf-8")
        click.echo(f"{name}\n\n{text}\n")


if __name__ == "__main__":
    main(prog_name="python -m bench.traffic")
