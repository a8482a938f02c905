"""Benchmarks: how fast, how large, how long to start; on a GPU beside its peers, without one on the host executor.

`run_suite` runs suites by name and returns a `Report` of `Record`, which `Report.to_json` writes. Every result is
checked before it is timed, and says where it was measured: a time on the host executor is never a time on a GPU.

>>> from cuattn.benchmark import SUITES
>>> sorted(SUITES)[:7]
['attention', 'backward', 'compile', 'counters', 'decode', 'differential', 'distributed']
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from cuattn.benchmark import (
    decode,
    differential,
    distributed,
    dual_chunk,
    gradients,
    host_figures,
    lengths,
    linear,
    operations,
    option_costs,
    problem,
    seed,
    sparse,
    start,
    variants,
)
from cuattn.benchmark.problem import Problem
from cuattn.benchmark.results import BenchmarkError, Record, Report, from_json
from cuattn.benchmark.suite import Options, Progress, Step, Suite, run_steps
from cuattn.errors import ArgumentError

__all__ = [
    "SUITES",
    "BenchmarkError",
    "Options",
    "Problem",
    "Record",
    "Report",
    "Suite",
    "from_json",
    "plan",
    "require_read",
    "run_suite",
]


def _figures(options: Options) -> list[Step]:
    names = ("latency", "host", "counters", "options", "gradients", "seed", "compile")
    return [step for name in names for step in SUITES[name].plan(options)]


def _host(options: Options) -> list[Step]:
    return [*host_figures.speed_steps(options), *gradients.speed_steps(options)]


SWEEP = frozenset({"dtypes", "seqlens", "head_dims"})
_TIMED = frozenset({"budget_s"})
_COMPARED = frozenset({"budget_s", "peers"})
_ATTENTION = SWEEP | _COMPARED | {"models"} | set(problem.ATTENTION)

_ALL = (
    Suite("smoke", "a little of everything, each result checked: under a minute", operations.smoke_steps, _COMPARED),
    Suite(
        "attention",
        "forward attention over sequence lengths, head dims and masks",
        operations.attention_steps,
        _ATTENTION,
    ),
    Suite(
        "backward",
        "its gradients, alone and with the forward, and their workspace",
        gradients.backward_steps,
        _ATTENTION,
    ),
    Suite("softmax", "softmax along rows of many lengths", operations.softmax_steps, _COMPARED | {"dtypes", "seqlens"}),
    Suite(
        "layout",
        "rotary embedding, splitting, packing and merging; attention on packed sequences",
        operations.layout_steps,
        _TIMED | {"dtypes"},
    ),
    Suite(
        "decode",
        "decoding over caches, plans, and whole generations, contiguous and paged",
        decode.decode_steps,
        SWEEP | _TIMED | {"models"} | set(problem.DECODE),
    ),
    Suite(
        "dual_chunk",
        "dual-chunk attention and decoding, beside plain calls",
        dual_chunk.dual_chunk_steps,
        SWEEP | _TIMED,
    ),
    Suite(
        "linear",
        "linear attention and its gradients, with bytes and operations beside",
        linear.linear_steps,
        SWEEP | _COMPARED,
    ),
    Suite("options", "what each option of attention costs beside the plain kernel", option_costs.option_steps, _TIMED),
    Suite(
        "differential",
        "differential attention beside two calls of attention",
        differential.differential_steps,
        _TIMED,
    ),
    Suite(
        "distributed",
        "attention over ranks: bytes that each sends, beside formulas, and the balance of their work",
        distributed.distributed_steps,
    ),
    Suite(
        "sparse",
        "block-sparse attention by density and block size, beside dense attention",
        sparse.sparse_steps,
        _COMPARED,
    ),
    Suite(
        "lengths",
        "attention, a window, a few blocks and linear attention over lengths: which takes least from where on",
        lengths.length_steps,
        _TIMED | {"dtypes", "seqlens"},
    ),
    Suite("gradients", "instructions and workspace of the backward beside its forward", gradients.gradient_steps),
    Suite(
        "seed",
        "time and peak memory, fused beside unfused, on problems with published figures",
        seed.seed_steps,
        _COMPARED,
    ),
    Suite("compile", "NVRTC time, registers, spills, shared memory and occupancy of kernels", variants.compile_steps),
    Suite("latency", "import, cached load, translation, Python overhead of a call", start.latency_steps),
    Suite("host", "the host executor: speed with the checkers off and on", _host, _TIMED),
    Suite("counters", "instructions, bytes and workspace, counted by the host executor", host_figures.count_steps),
    Suite(
        "figures", "latency, host, counters, options, gradients, seed, compile: all that needs no GPU", _figures, _TIMED
    ),
)

#: Name to `Suite`.
SUITES = {suite.name: suite for suite in _ALL}


def plan(names: Sequence[str], options: Options | None = None) -> list[Step]:
    """The steps of the named suites. Raises `ArgumentError` for a name that is none."""
    options = options or Options()
    for name in names:
        if name not in SUITES:
            raise ArgumentError(f"there is no suite {name!r}: choose from {', '.join(SUITES)}")
    return [step for name in dict.fromkeys(names) for step in SUITES[name].plan(options)]


def require_read(names: Sequence[str], given: Mapping[str, str]) -> None:
    """Raise `ArgumentError` if one of the suites does not read an option: field to what the user calls it."""
    for name in names:
        unread = [label for field, label in given.items() if field not in SUITES[name].reads]
        if unread:
            by = [suite.name for suite in _ALL if all(field in suite.reads for field in given)]
            hint = f"; {', '.join(by)} read{'s' * (len(by) == 1)} what is given" if by else ""
            raise ArgumentError(f"the suite {name} does not read {', '.join(unread)}{hint}")


def run_suite(
    names: Sequence[str] = ("smoke",),
    *,
    options: Options | None = None,
    progress: Progress | None = None,
    on_record: Callable[[Record], None] | None = None,
) -> Report:
    """Run suites and return their records.

    Parameters
    ----------
    names : sequence of str
        Keys of `SUITES`.
    options : Options, optional
    progress : callable, optional
        Called as ``progress(done_s, total_s, label)`` before each step; `cuattn.benchmark.tables.progress` makes one.
    on_record : callable, optional
        Called with each record as soon as it is there.

    Returns
    -------
    Report
        A step that fails leaves a record with an ``error``.

    Raises
    ------
    ArgumentError
        There is no such suite, or no such executor.
    BenchmarkError
        A GPU is asked for, and none answers.

    Examples
    --------
    >>> from cuattn.benchmark import run_suite
    >>> report = run_suite(["counters"])
    >>> report.records[0].metrics["workspace_bytes"]
    0
    """
    return run_steps(plan(names, options), progress=progress, on_record=on_record)
