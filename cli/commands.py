"""The list of subcommands: each is a module of its own, which is imported when the command is asked for."""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """Where a command is, and what its one line in ``--help`` says: reading that from the command would import it."""

    module: str  # of this package
    attribute: str
    summary: str  # the first sentence of the command's docstring


#: Name to entry, in the order of ``--help``. A new subcommand is a module and a line here.
COMMANDS = {
    "info": Entry("info", "info", "Say what is here: executors, GPU, NVRTC, CuPy, kernels, cache."),
    "list": Entry("listing", "list_", "List suites, kernels, rows of the configuration tables, and compiled variants."),
    "run": Entry("run", "run", "Run suites, print tables, write JSON."),
    "compare": Entry("compare", "compare", "Compare two result files: times with their intervals, counters exactly."),
    "plot": Entry("plot", "plot", "Draw result files as PNG or SVG."),
    "inspect": Entry("inspection", "inspect", "Count the instructions of kernels, and say how fast these could be."),
    "explain": Entry("explain", "explain", "Say how a call of attention would run on a GPU."),
    "estimate": Entry("estimate", "estimate", "Say what a model costs: parameters, cache, FLOPs, traffic, time."),
    "verify": Entry("verify", "verify", "Compare every row and option with float64."),
    "fuzz": Entry("fuzz", "fuzz", "Draw calls of operations, check them, shrink what fails."),
    "mutants": Entry("mutants", "mutants", "Edit a kernel in small wrong ways, and see whether its tests notice."),
    "doctor": Entry("doctor", "doctor", "Say what is installed, what is missing, and how to mend it."),
    "cache": Entry("cache", "cache", "Look after the cache of compiled kernels."),
}
