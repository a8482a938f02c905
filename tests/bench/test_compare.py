"""Comparing two reports: what is slower for certain, what is another number, and which files are not to be compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from cli.main import main
from cuattn.benchmark import BenchmarkError, Record, Report, from_json
from cuattn.benchmark.compare import BAD, changed_versions, compare, require_same_machine
from cuattn.errors import ArgumentError

HERE = {"cpu": "some processor", "cpu_cores": 2, "gpu": None, "nvrtc": "12.9"}


def timed(us: float, spread: float = 0.01, count: int = 30, seed: int = 0, **metrics: Any) -> Record:
    samples = us * (1 + spread * np.random.default_rng(seed).standard_normal(count))
    median = float(np.median(samples))
    return Record("s", "c", {"time_us": median, **metrics}, executor="host", samples={"time_us": samples.tolist()})


def report(*records: Record, **environment: Any) -> Report:
    return Report({**HERE, **environment}, records, "", 0.0)


def verdict(old: Record, new: Record, **options: Any) -> str:
    return {change.metric: change.verdict for change in compare(report(old), report(new), **options)}["time_us"]


@pytest.mark.parametrize(
    ("ratio", "spread", "wanted"),
    [
        (1.2, 0.01, "slower"),
        (0.8, 0.01, "faster"),
        (1.0, 0.01, "alike"),
        (1.05, 0.02, "unclear"),
        (1.1, 0.5, "unclear"),
    ],
)
def test_a_difference_counts_when_the_interval_says_so(ratio: float, spread: float, wanted: str) -> None:
    old, new = timed(100.0, spread), timed(100.0 * ratio, spread, seed=1)
    assert verdict(old, new) == wanted
    assert verdict(old, new, threshold=9.0) in ("alike", "unclear")


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Of 100 pairs of equal programs: the interval holds 1 in about 95; and the threshold hardly ever fails one."""
    held = slower = 0
    for seed in range(100):
        old, new = timed(100.0, 0.1, seed=2 * seed), timed(100.0, 0.1, seed=2 * seed + 1)
        (change,) = compare(report(old), report(new))
        assert change.interval is not None
        held += change.interval[0] <= 1 <= change.interval[1]
        slower += change.verdict == "slower"
    assert 85 <= held <= 100 and slower <= 2


def test_single_samples_decide_nothing() -> None:
    assert verdict(timed(100.0, count=1), timed(300.0, count=1)) == "unclear"
    old, new = Record("s", "c", {"import_ms": 10.0}), Record("s", "c", {"import_ms": 30.0})
    (change,) = compare(report(old), report(new))
    assert (change.verdict, change.ratio, change.interval) == ("unclear", 3.0, None)


def test_what_is_counted_is_equal_or_changed() -> None:
    counted = {"warp_instructions": 100, "ratio": 1.5, "registers": 128, "kernel": "a", "gflop_per_s": 3.0}
    old = Record("s", "c", counted, executor="host")
    new = replace(old, metrics={**counted, "warp_instructions": 101, "kernel": "b", "gflop_per_s": 9.0})
    found = {change.metric: change.verdict for change in compare(report(old), report(new))}
    assert found.pop("gflop_per_s") == "unclear"
    assert found == {"warp_instructions": "changed", "ratio": "equal", "registers": "equal", "kernel": "changed"}
    beside = {change.metric for change in compare(report(timed(1.0, ratio=2.0, mma=3)), report(timed(1.0, ratio=9.0)))}
    assert beside == {"time_us", "mma"}  # a ratio of times is no count


def test_cases_that_are_not_in_both() -> None:
    old = report(
        timed(1.0), Record("s", "gone", {"a": 1}), Record("s", "bad", {"a": 1}), Record("s", "ever", error="x")
    )
    new = report(timed(1.0), Record("s", "bad", error="broken"), Record("s", "more", {"a": 1}))
    found = {change.case: change.verdict for change in compare(old, new)}
    assert found == {"c": "alike", "gone": "missing", "bad": "failed", "more": "new"}
    assert {"missing", "failed"} <= BAD and "new" not in BAD
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ArgumentError, match="threshold is"):
            compare(old, new, threshold=wrong)


def test_machines_and_executors_must_be_the_same() -> None:
    old = report(timed(1.0))
    require_same_machine(old, report(timed(2.0), nvrtc="13.0"))
    require_same_machine(old, report(timed(2.0), Record("s", "x", {"registers": 9})))
    with pytest.raises(BenchmarkError, match="cpu_cores is 2 in one report and 4 in the other"):
        require_same_machine(old, report(timed(1.0), cpu_cores=4))
    on_gpu = replace(timed(1.0), executor="cuda")
    with pytest.raises(BenchmarkError, match="one report is of host, the other of cuda"):
        require_same_machine(old, report(on_gpu))
    require_same_machine(report(on_gpu, gpu="H200", cpu="a"), report(on_gpu, gpu="H200", cpu="b"))
    with pytest.raises(BenchmarkError, match="gpu is 'H200' in one report and 'A100'"):
        require_same_machine(report(on_gpu, gpu="H200"), report(on_gpu, gpu="A100"))
    assert changed_versions(old, report(nvrtc="13.0", commit="abc")) == ["nvrtc: 12.9 → 13.0", "commit: none → abc"]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Result]:
    def invoke(old: Report, new: Report, *arguments: str) -> Result:
        paths = [tmp_path / "old.json", tmp_path / "new.json"]
        for path, one in zip(paths, (old, new), strict=True):
            one.write(path)
        return CliRunner().invoke(main, ["compare", *map(str, paths), *arguments])

    return invoke


def test_the_command(run: Callable[..., Result], tmp_path: Path) -> None:
    old, new = report(timed(100.0, mma=3)), report(timed(120.0, seed=1, mma=3))
    result = run(old, new)
    assert result.exit_code == 0, result.output
    assert "slower" in result.stdout and "1 slower, 1 equal" in result.stdout and "mma" not in result.stdout
    assert run(old, new, "--fail").exit_code == 1
    assert run(old, new, "--fail", "--threshold", "30%").exit_code == 0
    assert run(old, new, "--fail", "--threshold", "0.3").exit_code == 0
    assert "mma" in run(old, new, "--all").stdout
    rows = json.loads(run(old, new, "--json").stdout)["new over old"]
    assert list(rows[0])[:3] == ["case", "by", "metric"] and rows[0]["case"] == "s: c"
    assert " by " not in result.stdout  # one alone was timed
    assert rows[0]["verdict"] == "slower" and rows[0]["ratio"] == pytest.approx(1.2, rel=0.02)
    assert from_json((tmp_path / "old.json").read_text()) == old  # the samples too


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [(["--threshold", "-5%"], 2, "is no share"), (["--threshold", "much"], 2, "is no share"), ([], 1, "--any-machine")],
)
def test_wrong_arguments(run: Callable[..., Result], arguments: list[str], code: int, words: str) -> None:
    result = run(report(timed(1.0)), report(timed(1.0), cpu="another"), *arguments)
    assert result.exit_code == code and words in result.stderr
    assert run(report(timed(1.0)), report(timed(1.0), cpu="another"), "--any-machine").exit_code == 0


def test_a_table_names_a_suite_once_and_peers_where_there_are_some(run: Callable[..., Result]) -> None:
    def records(us: float) -> list[Record]:
        return [replace(timed(us), suite="softmax", case="softmax_8x64_float32", provider=who) for who in ("a", "b")]

    lines = run(report(*records(1.0)), report(*records(2.0))).stdout.splitlines()
    assert lines[1].split()[:3] == ["case", "by", "metric"]
    wanted = ["softmax 8x64 float32 a", "softmax 8x64 float32 b"]
    assert [" ".join(line.split()[:4]) for line in lines[2:4]] == wanted


def test_files_that_are_none(tmp_path: Path) -> None:
    wrong = tmp_path / "x.json"
    wrong.write_text("{}")
    result = CliRunner().invoke(main, ["compare", str(wrong), str(wrong)])
    assert result.exit_code == 1 and "this is no benchmark report" in result.stderr
    assert CliRunner().invoke(main, ["compare", str(wrong), str(tmp_path / "none")]).exit_code == 2
    picture = tmp_path / "x.png"
    picture.write_bytes(b"\x89PNG\r\n")
    result = CliRunner().invoke(main, ["compare", str(picture), str(wrong)])
    assert result.exit_code == 1 and "x.png is no file of results" in result.stderr
    report().write(wrong)
    assert "no case in common" in CliRunner().invoke(main, ["compare", str(wrong), str(wrong)]).stderr
