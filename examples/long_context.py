"""Needles in 16,384 tokens: what kinds of attention find, how long they take, and what memory they need.

Eight needles lie in the haystack, from its beginning to its end. Each is a token whose key answers one question and
whose value says a symbol; the last eight tokens ask the questions. Everything else is drawn at random. A kind of
attention has found a needle if the largest element of its result is the needle's symbol.

"turned" kinds turn queries and keys by their positions (RoPE). Questions and answers are about the elements that turn
slowest: up to some 5,000 tokens apart they still point the same way, and a model that was trained on 4,096 tokens would
have seen no more. Farther away the question is turned against its answer, and far enough away back again; dual-chunk
attention turns by distances up to 4,096 only.

    python examples/long_context.py [--plot FILE] [--tokens N]

All of it is one head of 64, on the host executor: its times are those of an interpreter on the CPU, to be compared with
each other, and not those of a GPU.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import cuattn

HEAD_DIM = 64
NEEDLES = 8
SHARPNESS = 40.0  # the logit of a question and its needle
NOISE = 0.3  # how much of what is drawn is left in the elements that questions are about
WINDOW = 2048  # keys that a query of window attention sees
STRIDE, NEAR = 64, 128
BLOCK = 64
COLUMNS, LATEST = 32, 16  # keys that block-sparse attention keeps for all queries, by what so many of them look at
CHUNK, LOCAL = 4096, 1024  # of dual-chunk attention


class Task(NamedTuple):
    """q, k and v [1, tokens, 1, head_dim] in float16; where the needles are, and the symbols that they say."""

    q: Any
    k: Any
    v: Any
    places: np.ndarray
    symbols: np.ndarray


@dataclass
class Finding:
    """What one kind of attention did."""

    name: str
    seconds: float
    peak_bytes: int
    found: list[bool] = field(default_factory=list)


def task(tokens: int, seed: int = 0) -> Task:
    """Draw a haystack with its needles; the questions are the last tokens."""
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, tokens, HEAD_DIM)) / np.sqrt(HEAD_DIM)
    slow = np.arange(HEAD_DIM // 2 - NEEDLES // 2, HEAD_DIM // 2)  # and their partners, half a head farther
    k[:, np.concatenate([slow, slow + HEAD_DIM // 2])] *= NOISE
    questions = np.zeros((NEEDLES, HEAD_DIM))
    questions[np.arange(NEEDLES), np.repeat(slow, 2)] = np.tile([1, -1], NEEDLES // 2)  # two of a pair are opposites
    places = np.linspace(0, tokens - NEEDLES - 1, NEEDLES + 1).astype(int)[:-1] + 37
    k[places] = questions
    q[-NEEDLES:] = SHARPNESS * np.sqrt(HEAD_DIM) * questions  # attention divides by the root
    said = rng.integers(HEAD_DIM, size=tokens)
    said[places] = answers = rng.permutation(HEAD_DIM)[:NEEDLES]
    values = np.eye(HEAD_DIM)[said]
    return Task(*(x.astype(np.float16)[None, :, None] for x in (q, k, values)), places, answers)


def full(q: Any, k: Any, v: Any) -> Any:
    return cuattn.attention(q, k, v, causal=True)


def windowed(q: Any, k: Any, v: Any) -> Any:
    return cuattn.attention(q, k, v, causal=True, window=(WINDOW - 1, 0))


def strided(q: Any, k: Any, v: Any) -> Any:
    return cuattn.strided_attention(q, k, v, STRIDE, local=NEAR)


def block_sparse(q: Any, k: Any, v: Any) -> Any:
    """Keep the keys that the latest queries look at most, and those near by: MInference (Jiang et al., 2024)."""
    tokens = q.shape[1]
    scores = q[0, -LATEST:, 0].astype(np.float32) @ k[0, :, 0].astype(np.float32).T / np.sqrt(HEAD_DIM)
    columns = np.argsort(cuattn.softmax(scores).sum(axis=0))[-COLUMNS:]
    blocks = cuattn.vertical_slash_mask(tokens, tokens, BLOCK, vertical=columns, slash=[0, BLOCK])
    mask = cuattn.BlockMask.from_blocks(blocks, tokens, tokens, BLOCK)
    return cuattn.block_sparse_attention(q, k, v, mask, causal=True)


def linear(q: Any, k: Any, v: Any) -> Any:
    return cuattn.linear_attention(q, k, v)


def turned(q: Any, k: Any, v: Any) -> Any:
    positions = np.arange(q.shape[1])
    return cuattn.attention(cuattn.rope(q, positions), cuattn.rope(k, positions), v, causal=True)


def dual_chunk(q: Any, k: Any, v: Any) -> Any:
    return cuattn.dual_chunk_attention(q, k, v, chunk_size=CHUNK, local_size=LOCAL)


KINDS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "full": full,
    f"window {WINDOW}": windowed,
    f"strided {STRIDE}": strided,
    "block-sparse": block_sparse,
    "linear": linear,
    "full, turned": turned,
    "dual-chunk, turned": dual_chunk,
}


def measured(name: str, kind: Callable[[Any, Any, Any], Any], given: Task) -> Finding:
    """Compute attention of all tokens, once for the kernels to be there and once for the clock."""
    few = slice(0, 2 * BLOCK)
    kind(given.q[:, few], given.k[:, few], given.v[:, few])
    tracemalloc.start()
    start = time.perf_counter()
    out = kind(given.q, given.k, given.v)
    seconds = time.perf_counter() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    answers = out[0, -NEEDLES:, 0].astype(np.float32).argmax(axis=1)
    return Finding(name, seconds, peak, (answers == given.symbols).tolist())


def line(finding: Finding) -> str:
    marks = " ".join("+" if right else "-" for right in finding.found)
    return f"{finding.name:<22}{finding.seconds:>8.1f} s{finding.peak_bytes / 2**20:>9.1f} MiB   {marks}"


def save(path: Path, findings: list[Finding], given: Task) -> None:
    """Draw time, memory and answers side by side. Needs matplotlib: the extra "plot"."""
    from matplotlib.figure import Figure

    names, rows = [finding.name for finding in findings], np.arange(len(findings))
    figure = Figure(figsize=(10, 1.2 + 0.42 * len(findings)), layout="constrained")
    of_time, of_memory, of_answers = figure.subplots(1, 3, sharey=True, width_ratios=(1, 1, 1.4))
    of_time.barh(rows, [finding.seconds for finding in findings], color="#0072b2")
    of_time.set_xlabel("seconds on the host executor")
    of_memory.barh(rows, [finding.peak_bytes / 2**20 for finding in findings], color="#56b4e9")
    of_memory.set_xlabel("MiB allocated at most")
    tokens = given.q.shape[1]
    for row, finding in zip(rows, findings, strict=True):
        for place, right in zip(given.places, finding.found, strict=True):
            style = {"color": "#009e73", "marker": "o"} if right else {"color": "#d55e00", "marker": "x"}
            of_answers.plot(place, row, markersize=8, markeredgewidth=2, **style)
    of_answers.set_xlim(-0.03 * tokens, 1.03 * tokens)
    of_answers.set_xlabel("where the needle is (o found, x not)")
    of_time.set_yticks(rows, names)
    of_time.invert_yaxis()
    for axes in (of_time, of_memory, of_answers):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, axis="x")
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384, help="length of the haystack (16384)")
    parser.add_argument("--plot", type=Path, help="where to save a picture")
    options = parser.parse_args(arguments)
    given = task(options.tokens)
    scores = options.tokens**2 * 2 / 2**20
    print(f"{options.tokens} tokens, {NEEDLES} needles; all scores in float16 would take {scores:.0f} MiB\n")
    print(f"{'attention':<22}{'time':>10}{'memory':>13}   needles, from the first to the last")
    findings = []
    for name, kind in KINDS.items():
        findings.append(measured(name, kind, given))
        print(line(findings[-1]), flush=True)
    if options.plot is not None:
        save(options.plot, findings, given)
        print(f"\nplot: {options.plot}")


if __name__ == "__main__":
    main()
