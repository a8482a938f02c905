"""The small example programs run and print what they claim."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / name), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_first_attention() -> None:
    assert run("first_attention.py").strip() == "(1, 256, 8, 64) float16 (1, 8, 256) float32"


def test_paged_decode() -> None:
    output = run("paged_decode.py")
    assert output.startswith("(2, 1, 8, 64) float16 ")
    difference = float(output.split()[-1])
    assert difference < 2e-3  # two roundings of an output below 2 to 11 bits


def test_raw_kernel_finds_the_race() -> None:
    output = run("raw_kernel.py")
    assert "with the barrier: right" in output
    assert "without it: a race at" in output


def test_divided_sequence() -> None:
    lines = run("divided_sequence.py", "--ranks", "3", "--tokens", "50").splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"rank {rank} of 3" for rank in range(3)]
    assert sum(int(line.split(": ")[1].split()[0]) for line in lines) == 50
