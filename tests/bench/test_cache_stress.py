"""The long tests of the cache and of interrupted compilations, with a small count."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("name", "count"), [("compile_interrupts", 6), ("cache_faults", 4)])
def test_nothing_is_wrong(name: str, count: int) -> None:
    command = [sys.executable, "-m", f"bench.stress.{name}", "--count", str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("nothing wrong\n")
