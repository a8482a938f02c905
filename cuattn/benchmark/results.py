"""What a benchmark run leaves behind: records with their environment, as JSON.

A `Record` is one thing that was measured: its metrics have their units in their names (``time_us``, ``gflop_per_s``),
`method` says in a sentence how they came about, and `executor` where: ``"cuda"`` is a GPU, ``"host"`` the host executor
on a CPU, ``"none"`` figures of a kernel that did not run. A time on the host executor is never a time on a GPU.

>>> record = Record("demo", "call", {"time_us": 12.0}, goals={"time_us": "<= 20"})
>>> record.verdicts
{'time_us': True}
"""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cuattn.errors import ArgumentError, CuattnError

SCHEMA_VERSION = 2  # since 2: samples, and whether a run came to its end
READABLE = (1, 2)
EXECUTORS = ("host", "cuda", "none")

Value = bool | int | float | str | None
Metrics = Mapping[str, Value]

_GOAL = re.compile(r"(<=|>=|==) *(-?\d+(?:\.\d+)?(?:e-?\d+)?)")
_NUMBERS = re.compile(r"\[\n([\d\s.,e+-]*)\]")  # a list of numbers over several lines; no text has a line break in it
_COMPARE = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}


class BenchmarkError(CuattnError, RuntimeError):
    """A benchmark cannot run here, or a result file is not one."""


@dataclass(frozen=True, slots=True)
class Record:
    """One measurement, or the error that was there instead.

    Attributes
    ----------
    suite, case : str
        What was run: a suite of `cuattn.benchmark.SUITES` and a problem in it.
    metrics : mapping of str to number, text or None
    provider : str
        Whose code it was: ``"cuattn"``, or a peer.
    executor : str
        ``"host"``, ``"cuda"`` or ``"none"``.
    method : str
        How it was measured.
    goals : mapping of str to str
        Name of a metric to what it should be: ``"<= 10"``.
    error : str
        Why there are no metrics, if there are none.
    samples : mapping of str to sequence of float
        Name of a metric to the single values that it is the median of, in the order in which they were taken.
    """

    suite: str
    case: str
    metrics: Metrics = field(default_factory=dict)
    provider: str = "cuattn"
    executor: str = "none"
    method: str = ""
    goals: Mapping[str, str] = field(default_factory=dict)
    error: str = ""
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise ArgumentError(f"executor is {self.executor!r}; allowed are {', '.join(EXECUTORS)}")
        for metric, goal in self.goals.items():
            if not _GOAL.fullmatch(goal):
                raise ArgumentError(f"goal of {metric} is {goal!r}; write '<= 10', '>= 10' or '== 0'")

    @property
    def verdicts(self) -> dict[str, bool]:
        """Name of each metric with a goal to whether it was reached; one that was not measured is not."""
        return {metric: _reached(self.metrics.get(metric), goal) for metric, goal in self.goals.items()}


def _reached(value: Value, goal: str) -> bool:
    match = _GOAL.fullmatch(goal)
    if match is None or not isinstance(value, int | float):
        return False
    return bool(_COMPARE[match[1]](value, float(match[2])))


@dataclass(frozen=True, slots=True)
class Report:
    """The records of a run, where and when they were made."""

    environment: Mapping[str, Value]
    records: tuple[Record, ...]
    created: str  # UTC, ISO 8601
    duration_s: float
    schema_version: int = SCHEMA_VERSION
    complete: bool = True  # False: the run was interrupted, or is still going on

    @property
    def failures(self) -> tuple[Record, ...]:
        """Records of cuattn itself that have an error. A peer that refuses a problem is no failure."""
        return tuple(record for record in self.records if record.error and record.provider == "cuattn")

    @property
    def missed(self) -> tuple[Record, ...]:
        """Records that were measured and missed a goal of theirs."""
        return tuple(record for record in self.records if not record.error and not all(record.verdicts.values()))

    def to_json(self) -> str:
        """Text that `from_json` reads. No paths of this machine are in it."""
        data = {name: getattr(self, name) for name in ("schema_version", "created", "duration_s", "environment")}
        if not self.complete:
            data["complete"] = False
        data["records"] = [_trimmed(record) for record in self.records]
        text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
        return _NUMBERS.sub(lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"

    def write(self, path: Path) -> None:
        """Write the JSON, whole or not at all."""
        write_text(path, self.to_json())


def _trimmed(record: Record) -> dict[str, Any]:
    fields = dataclasses.asdict(record)
    for name, value in record.metrics.items():
        if isinstance(value, float) and not math.isfinite(value):
            fields["metrics"][name] = None  # JSON has no such numbers
    return {name: value for name, value in fields.items() if value not in ("", {}) or name == "metrics"}


def from_json(text: str) -> Report:
    """Read what `Report.to_json` wrote.

    Raises
    ------
    BenchmarkError
        The text is no report, or one of another schema version.
    """
    try:
        data = json.loads(text)
        version = data.pop("schema_version")
        if version not in READABLE:
            raise BenchmarkError(f"the report has schema version {version}; this version reads 1 and {SCHEMA_VERSION}")
        records = tuple(Record(**fields) for fields in data.pop("records"))
        return Report(records=records, schema_version=version, **data)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BenchmarkError(f"this is no benchmark report: {type(error).__name__}: {error}") from error


def spelt(name: str) -> str:
    """A case name in the one style that they have: words of letters and digits with underscores between.

    >>> spelt("mask [N, M], half of the tiles")
    'mask_nm_half_of_the_tiles'
    """
    axes = re.sub(r"\[([A-Z, ]+)\]", lambda match: match[1].replace(", ", "").lower(), name)
    return re.sub(r"\W+", "_", axes).strip("_")


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def scrub(text: str, extra: Sequence[tuple[Path, str]] = ()) -> str:
    """`text` without the paths of this machine: results are published, and where things lay is nobody's business."""
    checkout = Path(__file__).resolve().parents[2]
    named = [
        *extra,
        (checkout, "<checkout>"),
        (Path(sys.prefix), "<prefix>"),
        (Path(sys.base_prefix), "<python>"),
        (Path(tempfile.gettempdir()), "<tmp>"),
        (Path.home(), "<home>"),
    ]
    # The longest first: one of these may lie in another.
    for path, name in sorted(named, key=lambda pair: -len(str(pair[0]))):
        for spelling in {str(path), str(path.resolve())} - {"/"}:
            text = text.replace(spelling, name)
    return text
