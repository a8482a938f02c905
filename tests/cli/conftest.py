"""The program, run in this process, and a cache with nothing in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli.main import main
from cuattn import benchmark
from cuattn.benchmark.operations import case_steps
from cuattn.benchmark.suite import Step, Suite
from cuattn.testing.cases import AttentionCase

Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the program; the one-minute suite is a tiny problem."""

    def tiny(options: benchmark.Options) -> list[Step]:
        return case_steps("smoke", [AttentionCase(1, 16, 1, 32)], options)

    monkeypatch.setitem(benchmark.SUITES, "smoke", Suite("smoke", "tiny", tiny))
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*arguments: str, **options: str) -> Result:
        return CliRunner().invoke(main, arguments, prog_name="cuattn-bench", **options)  # type: ignore[arg-type]

    return invoke


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv("CUATTN_CACHE_DIR", str(path))
    return path
