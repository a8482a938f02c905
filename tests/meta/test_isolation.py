"""What importing the package must not pull in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=root)
    return set(result.stdout.split())


def test_cuattn_does_not_import_its_testing_tools():
    assert not {"cuattn.testing", "cuattn.reference", "hypothesis", "scipy"} & modules_after("import cuattn")


def test_only_the_strategies_need_hypothesis():
    tools = "import cuattn.testing.cases, cuattn.testing.arrays, cuattn.testing.executors, cuattn.testing.tolerance"
    assert not {"hypothesis", "pytest", "cupy", "scipy"} & modules_after(tools)
    assert "hypothesis" in modules_after("import cuattn.testing.strategies")
