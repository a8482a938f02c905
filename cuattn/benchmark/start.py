"""Latencies around a call: importing, loading a cached kernel, translating PTX, and the Python of the call itself."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import cuattn
from cuattn import compile, environment
from cuattn.benchmark import cuda_calls
from cuattn.benchmark.replaced import replaced
from cuattn.benchmark.results import BenchmarkError, Record, scrub
from cuattn.benchmark.suite import Options, Step
from cuattn.ops.attention.forward.config import FlashFwdConfig, select
from cuattn.ops.attention.variants import ForwardOptions
from cuattn.runtime.executor import executor_for
from cuattn.runtime.timer import significant

PROCESSES = 7
# Counted from the start of the program: cuda-bindings puts a part of itself into every Python process.
_HEAVY = '{"cupy", "cupyx", "scipy", "cuda"} & {name.partition(".")[0] for name in set(sys.modules) - before}'

_IMPORTING = f"""
import json, sys, time
before = set(sys.modules)
start = time.perf_counter()
import numpy
middle = time.perf_counter()
import cuattn
end = time.perf_counter()
cuattn.attention
function = time.perf_counter()
print(json.dumps({{"numpy_ms": 1e3 * (middle - start), "import_ms": 1e3 * (end - middle),
                  "with_attention_ms": 1e3 * (function - middle), "heavy_modules": len({_HEAVY})}}))
"""
# The first call in a process whose kernel is in the cache, and loading a second such kernel.
_CALLING = f"""
import json, sys, time
before = set(sys.modules)
import numpy as np
start = time.perf_counter()
import cuattn
x = np.ones((1, 2, 1, 8), np.float16)
cuattn.attention(x, x, x)
first = time.perf_counter()
cuattn.attention(x, x, x, causal=True)
second = time.perf_counter()
cuattn.attention(x, x, x, causal=True)
third = time.perf_counter()
print(json.dumps({{"first_call_ms": 1e3 * (first - start), "load_ms": 1e3 * (2 * second - first - third),
                  "heavy_modules": len({_HEAVY})}}))
"""


def latency_steps(options: Options) -> list[Step]:
    """Steps that measure everything around the kernel itself; where a GPU answers, of calls on it too."""
    steps = [
        Step("latency", "import", 4.0, importing),
        Step("latency", "cached_load", 5.0, loading),
        Step("latency", "translation", 1.0, translation),
        Step("latency", "call_overhead", 2.0, call_overhead),
    ]
    return [*cuda_calls.call_steps(), *steps] if options.resolved() == "cuda" else steps


def importing() -> Iterator[Record]:
    """Time ``import cuattn`` after ``import numpy``."""
    runs = in_fresh_processes(_IMPORTING)
    names = ("import_ms", "with_attention_ms", "numpy_ms")
    metrics = {name: significant(statistics.median(run[name] for run in runs)) for name in names}
    metrics["heavy_modules"] = max(run["heavy_modules"] for run in runs)
    yield Record(
        "latency",
        "import",
        metrics,
        method=f"import cuattn in a process that has imported numpy, without and with cuattn.attention: medians of "
        f"{PROCESSES} processes; heavy modules are CuPy, SciPy and the CUDA bindings",
        goals={"import_ms": "<= 30", "heavy_modules": "== 0"},
    )


def loading() -> Iterator[Record]:
    """Time the loading of a kernel that is in the cache."""
    runs = in_fresh_processes(_CALLING, warm_up=1)
    metrics = {name: significant(statistics.median(run[name] for run in runs)) for name in ("load_ms", "first_call_ms")}
    metrics["heavy_modules"] = max(run["heavy_modules"] for run in runs)
    yield Record(
        "latency",
        "cached_load",
        metrics,
        executor="host",
        method="what the first call of a kernel that is in the cache takes above its second one, in a process that has "
        f"called another kernel; first_call_ms begins before the import of cuattn: medians of {PROCESSES} processes",
        goals={"load_ms": "<= 10", "heavy_modules": "== 0"},
    )


def forward_config(head_dim: int = 64) -> FlashFwdConfig:
    """The row of the portable forward for long float16 sequences on the host's architecture."""
    limit = compile.smem_limit_bytes(environment.host_arch())
    return select(np.dtype(np.float16), head_dim, head_dim, seqlen_q=1024, smem_limit_bytes=limit)


def translation() -> Iterator[Record]:
    """Time the translation of PTX to the table of the host executor."""
    from cuattn.host import ptx, table

    for head_dim in (64, 128):
        config = forward_config(head_dim)
        constants = config.constants("float16", head_dim, head_dim, ForwardOptions(bound_right=True))
        binary = compile.build(config.source, constants, arch=environment.host_arch(), kind="ptx")
        text = binary.image.decode()
        times = []
        for _ in range(7):
            start = time.perf_counter()
            module = ptx.parse(text)
            for entry in module.entries.values():
                table.build_table(module, entry)
            times.append(1e3 * (time.perf_counter() - start))
        yield Record(
            "latency",
            f"translation_d{head_dim}",
            {"translation_ms": significant(statistics.median(times)), "ptx_lines": text.count("\n")},
            method="parsing the PTX of the causal float16 forward and building its table: median of 7",
            goals={"translation_ms": "<= 200"},
        )


def call_overhead(calls: int = 3000) -> Iterator[Record]:
    """Time the Python of `attention` and `softmax`, with the launch itself taken out."""
    q = np.ones((1, 16, 2, 64), np.float16)
    x = np.ones((16, 256), np.float32)
    for name, call in {
        "attention": lambda: cuattn.attention(q, q, q, causal=True),
        "softmax": lambda: cuattn.softmax(x),
    }.items():
        call()  # compile and load before the launch is taken out
        with without_launches(executor_for(q=q)):
            times = []
            for _ in range(calls):
                start = time.perf_counter()
                call()
                times.append(1e6 * (time.perf_counter() - start))
        metrics = {"overhead_us": significant(statistics.median(times)), "best_us": significant(min(times))}
        yield Record(
            "latency",
            f"call_overhead_{name}",
            metrics,
            method=f"a call with NumPy arrays whose launch does nothing, checkers off: median of {calls}",
            goals={"overhead_us": "<= 60"},
        )


@contextmanager
def without_launches(executor: Any) -> Iterator[None]:
    """Choose, check and pack kernels as ever, but start none in the block."""
    with replaced(executor, "_start", lambda *arguments: None):
        yield


def in_fresh_processes(code: str, *, count: int = PROCESSES, warm_up: int = 1) -> list[dict[str, Any]]:
    """Run ``code`` in so many interpreters, behind some that warm the file system; returns what it printed as JSON."""
    root = Path(cuattn.__file__).resolve().parents[1]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    answers = []
    for _ in range(warm_up + count):
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            raise BenchmarkError(scrub(f"a measuring process failed: {result.stderr.strip()[-300:]}"))
        answers.append(json.loads(result.stdout.splitlines()[-1]))
    return answers[warm_up:]
