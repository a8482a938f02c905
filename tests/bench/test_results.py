"""The schema of result files: round trip, goals, refusals, and nothing of the machine in them."""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from pathlib import Path

import pytest

from cuattn.benchmark import BenchmarkError, Record, Report, from_json, machine
from cuattn.benchmark.results import SCHEMA_VERSION, scrub, write_text
from cuattn.errors import ArgumentError

ROOT = Path(__file__).resolve().parents[2]
RECORDS = (
    Record(
        "demo", "fast", {"time_us": 12.5, "spills": 0}, executor="host", goals={"time_us": "<= 20", "spills": "== 0"}
    ),
    Record("demo", "peer", {}, "torch", "cuda", error="PeerError: no"),
)


def report() -> Report:
    return Report({"gpu": None, "cpu": "some processor"}, RECORDS, "2026-01-01T00:00:00+00:00", 1.5)


@pytest.mark.smoke
def test_round_trip() -> None:
    text = report().to_json()
    assert from_json(text) == report()
    data = json.loads(text)
    assert set(data) == {"schema_version", "created", "duration_s", "environment", "records"}
    assert data["schema_version"] == SCHEMA_VERSION
    assert data["records"][1] == {
        "suite": "demo",
        "case": "peer",
        "metrics": {},
        "provider": "torch",
        "executor": "cuda",
        "error": "PeerError: no",
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        json.dumps({"schema_version": SCHEMA_VERSION, "records": [{"unknown": 1}]}),
        json.dumps({"schema_version": SCHEMA_VERSION, "records": [{"suite": "a", "case": "b", "executor": "tpu"}]}),
        report().to_json().replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 999'),
    ],
)
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(BenchmarkError, match=r"no benchmark report|schema version 999"):
        from_json(text)


@pytest.mark.parametrize(
    ("goal", "value", "reached"),
    [
        ("<= 10", 10, True),
        ("<= 10", 10.5, False),
        (">= 0.2", 0.2, True),
        (">= 0.2", 0.1, False),
        ("== 0", 0, True),
        ("== 0", 8, False),
        ("<= 1e-3", 1e-4, True),
        ("<= 10", None, False),
        ("<= 10", "fast", False),
        ("<= 10", float("nan"), False),
    ],
)
def test_goals(goal: str, value: object, reached: bool) -> None:
    assert Record("demo", "x", {"y": value}, goals={"y": goal}).verdicts == {"y": reached}  # type: ignore[dict-item]


def test_a_goal_that_was_not_measured_is_not_reached() -> None:
    assert Record("demo", "x", {}, goals={"y": "<= 1"}).verdicts == {"y": False}


@pytest.mark.parametrize("wrong", [{"goals": {"y": "fast"}}, {"executor": "gpu"}])
def test_wrong_records_are_refused(wrong: dict) -> None:
    with pytest.raises(ArgumentError, match=r"allowed are host, cuda, none|write '<= 10'"):
        Record("demo", "x", {}, **wrong)


def test_a_peer_that_refuses_is_no_failure() -> None:
    assert report().failures == ()
    own = Record("demo", "x", error="wrong")
    assert Report({}, (*RECORDS, own), "", 0).failures == (own,)


def test_what_json_cannot_say_becomes_null() -> None:
    record = Record("demo", "x", {"a": float("nan"), "b": float("inf"), "c": 1.0})
    text = Report({}, (record,), "", 0).to_json()
    assert from_json(text).records[0].metrics == {"a": None, "b": None, "c": 1.0}


def test_scrub_replaces_the_paths_of_this_machine(machine_paths) -> None:
    places = [ROOT / "cuattn/x.py", Path(sys.prefix) / "lib", Path(tempfile.gettempdir()) / "abc", Path.home() / "file"]
    text = scrub("\n".join(f'File "{place}", line 1' for place in places))
    assert machine_paths(text) == []
    assert "<checkout>/cuattn/x.py" in text


def test_the_description_of_a_machine_does_not_say_which_one_it_is(machine_paths) -> None:
    text = json.dumps(machine.describe())
    assert machine_paths(text) == []
    assert platform.node() == "" or f'"{platform.node()}"' not in text
    assert {"gpu", "cpu", "nvrtc", "cupy", "numpy", "python", "commit", "source_sha256"} <= set(machine.describe())


def test_write_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "x.json"
    write_text(path, "first")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_text(path, "second")
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("path", sorted((ROOT / "bench/results").glob("*.json")), ids=lambda path: path.name)
def test_committed_results(path: Path, machine_paths) -> None:
    text = path.read_text(encoding="utf-8")
    found = from_json(text)
    assert machine_paths(text) == []
    assert found.records
    assert found.failures == ()
    if found.environment["gpu"] is None:
        assert {record.executor for record in found.records} <= {"host", "none"}
