"""The page on benchmarks shows what the committed result file holds, and its example runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import host_figures
from cuattn.benchmark import Record, Report, from_json

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_made_from_the_results() -> None:
    page = host_figures.PAGE.read_text(encoding="utf-8")
    report = from_json(host_figures.RESULTS.read_text(encoding="utf-8"))
    assert host_figures.with_table(page, report) == page, "run python -m bench.host_figures --page"


def test_rows_name_the_worst_compilation_and_every_goal() -> None:
    goals = {"nvrtc_ms": "<= 1000", "spill_bytes": "== 0"}
    report = Report(
        {},
        (
            Record("latency", "import", {"import_ms": 1.25}, method="how", goals={"import_ms": "<= 30"}),
            Record("host", "attention_b1_n16_m16_h8_g8_d64_e64_float16_unchecked", {"gflop_per_s": 21.5}, method="how"),
            Record("compile", "a", {"nvrtc_ms": 300.0, "spill_bytes": 0, "registers": 9}, method="m", goals=goals),
            Record("compile", "b", {"nvrtc_ms": 900.0, "spill_bytes": 8, "registers": 9}, method="m", goals=goals),
            Record("compile", "c", {"nvrtc_ms": 100.0, "ptx_lines": 9}, method="p", goals={"nvrtc_ms": "<= 1000"}),
        ),
        "2026-01-01T00:00:00+00:00",
        1.0,
    )
    assert list(host_figures.rows(report)) == [
        ("import: import, ms", "1.25", "<= 30", "how"),
        ("attention B 1 N 16 H 8 D 64 float16: GFLOP/s", "21.5", "", "how"),
        ("NVRTC, source to CUBIN, slowest of 2 plain and causal variants with D up to 128: ms", "900", "<= 1000", "m"),
        ("NVRTC, source to PTX, slowest of 1 plain and causal variants with D up to 128: ms", "100", "<= 1000", "p"),
        ("register spills, all 2 kernels on sm_80 and sm_90a: bytes", "8", "== 0", "ptxas"),
    ]


@pytest.mark.slow
def test_the_example_of_the_page_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", host_figures.PAGE.read_text(encoding="utf-8"), re.DOTALL)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(" records\n")
