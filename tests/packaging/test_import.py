"""`import cuattn` is light: what is heavy is imported when it is first needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def modules_after(code: str) -> set[str]:
    """Top-level modules that ``code`` imports, beyond what is there in every process (cuda-bindings adds to that)."""
    result = subprocess.run(
        [sys.executable, "-c", f"import sys\nbefore = set(sys.modules)\n{code}\nprint(*set(sys.modules) - before)"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.partition(".")[0] for name in result.stdout.split()}


@pytest.mark.smoke
def test_import_touches_no_cuda_and_nothing_heavy() -> None:
    assert modules_after("import cuattn") & {"cupy", "cupyx", "cuda", "scipy", "click", "rich", "subprocess"} == set()


@pytest.mark.smoke
def test_a_cached_call_on_numpy_arrays_imports_no_cupy() -> None:
    call = "import numpy as np, cuattn\nx = np.ones((1, 2, 1, 8), np.float32)\ncuattn.attention(x, x, x)"
    modules_after(call)  # fills the cache where it is cold
    assert modules_after(call) & {"cupy", "cupyx", "scipy"} == set()
