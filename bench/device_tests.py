"""pytest on one executor, with its results kept test by test."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from cuattn.benchmark.results import write_text

ROOT = Path(__file__).resolve().parents[1]
MAX_WORKERS = 8
RESERVE_S = 8.0  # for pytest to end by itself before it is ended


def run(executor: str, paths: tuple[str, ...], out: Path, *, until: float) -> dict[str, Any]:
    """Run the tests that run on `executor`; those that did not get their turn in time are not counted.

    Tests whose results lie in ``tests.jsonl`` already are not run again.
    """
    lines = out / "tests.jsonl"
    _forget_stops(lines)
    seconds = until - time.monotonic()
    command = [sys.executable, "-m", "pytest", *paths, "-q", "-p", "no:cacheprovider"]
    command += ["-p", "bench.pytest_record"]
    if importlib.util.find_spec("xdist") and executor == "cuda":
        command += ["-n", str(max(1, min(MAX_WORKERS, (os.cpu_count() or 2) // 2)))]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "BENCH_TEST_EXECUTOR": executor,
        "BENCH_TEST_RECORD": str(lines),
        "BENCH_TEST_SECONDS": str(seconds - RESERVE_S),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(out / "hypothesis"),
    }
    try:
        code: int | None = subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        code = None
    return summarize(lines, code)


def _forget_stops(lines: Path) -> None:
    """Keep the results of an earlier run, but not that it was stopped, nor a last line that was cut off."""
    if lines.exists():
        whole = [line for line in lines.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("}\n")]
        write_text(lines, "".join(line for line in whole if "stopped" not in json.loads(line)))


def summarize(lines: Path, code: int | None) -> dict[str, Any]:
    """Return the counts of a run, and the first words of each failure."""
    text = lines.read_text(encoding="utf-8") if lines.exists() else ""
    rows = [json.loads(line) for line in text.splitlines()]
    counts = Counter(row["outcome"] for row in rows if "test" in row)
    failures = [{"test": row["test"], "message": row["message"]} for row in rows if row.get("outcome") == "failed"]
    slowest = sorted((row for row in rows if "seconds" in row), key=lambda row: -row["seconds"])[:10]
    return {
        "passed": counts["passed"],
        "failed": counts["failed"],
        "skipped": counts["skipped"],
        "stopped": any("stopped" in row for row in rows) or code is None,
        "exit_code": code,
        "failures": failures,
        "slowest": [{"test": row["test"], "seconds": row["seconds"]} for row in slowest],
    }
