"""Two reports beside each other: what became slower, and which counters and resources are other numbers.

Of times the ratio of the medians is given with a bootstrap interval of 95 %: a difference counts when the whole
interval lies beyond the threshold, not when one noisy median does. What is counted, of instructions, bytes, registers,
is the same or it is not.

>>> record = {"suite": "demo", "case": "x", "executor": "host"}
>>> from cuattn.benchmark.results import Record, Report
>>> old = Report({}, (Record(**record, metrics={"time_us": 10.0}, samples={"time_us": [9.9, 10.0, 10.1]}),), "", 0)
>>> new = Report({}, (Record(**record, metrics={"time_us": 20.0}, samples={"time_us": [19.8, 20.0, 20.2]}),), "", 0)
>>> [(change.metric, change.ratio, change.verdict) for change in compare(old, new)]
[('time_us', 2.0, 'slower')]
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuattn.benchmark.results import BenchmarkError, Record, Report, Value
from cuattn.errors import ArgumentError
from cuattn.runtime.timer import significant

__all__ = ["BAD", "Change", "changed_versions", "compare", "require_same_machine"]

#: Verdicts that are a reason to refuse a change.
BAD = frozenset({"slower", "changed", "failed", "missing"})
#: Times, and rates of whole runs, for which there is but one number.
_TIMES = re.compile(r"(.*_)?(us|ms|s)")
#: What follows from times, or says how they were taken.
_FROM_TIMES = re.compile(
    r".*_per(_core)?_s|.*_ms|.*_us|cores|unchecked_cores|spread|samples|fraction_.*|speed_over_.*|.*_over_unchecked"
)
_OF_HOST = ("cpu", "cpu_cores", "host_isa", "host_threads", "host_arch", "system")
_OF_GPU = ("gpu", "compute_capability", "num_sms", "memory_gib", "driver", "driver_cuda")
_VERSIONS = ("nvrtc", "cupy", "numpy", "torch", "python", "cuattn", "commit", "source_sha256")
Key = tuple[str, str, str, str]  # suite, case, provider, executor
CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Change:
    """One metric of one case in both reports.

    ``verdict``: "slower", "faster", "alike" (the interval lies within the threshold) or "unclear" of a time; "equal" or
    "changed" of what is counted; "failed", "missing" or "new" of a case that is not in both.
    """

    suite: str
    case: str
    provider: str
    executor: str
    metric: str
    old: Value
    new: Value
    ratio: float | None
    interval: tuple[float, float] | None
    verdict: str


def require_same_machine(old: Report, new: Report) -> None:
    """Raise `BenchmarkError` unless both reports come from the same kind of machine and the same executors."""
    executors = [{record.executor for record in report.records if not record.error} - {"none"} for report in (old, new)]
    if executors[0] != executors[1]:
        raise BenchmarkError(
            f"one report is of {_and(executors[0])}, the other of {_and(executors[1])}: these are not to be compared"
        )
    names = (*(_OF_HOST if "host" in executors[0] else ()), *(_OF_GPU if "cuda" in executors[0] else ()))
    for name in names:
        first, second = old.environment.get(name), new.environment.get(name)
        if first != second:
            raise BenchmarkError(f"{name} is {first!r} in one report and {second!r} in the other: times say nothing")


def _and(executors: set[str]) -> str:
    return " and ".join(sorted(executors)) or "nothing"


def changed_versions(old: Report, new: Report) -> list[str]:
    """What else is not the same in the two environments, in words."""
    pairs = ((name, old.environment.get(name), new.environment.get(name)) for name in _VERSIONS)
    return [f"{name}: {first or 'none'} → {second or 'none'}" for name, first, second in pairs if first != second]


def compare(old: Report, new: Report, *, threshold: float = 0.05, seed: int = 0) -> list[Change]:
    """Compare every metric of every case.

    Parameters
    ----------
    threshold : float
        By how much a time may be longer: 0.05 is 5 %.
    seed : int
        Of the bootstrap, which is thereby the same every time.

    Raises
    ------
    ArgumentError
        The threshold is negative or no number.
    """
    if not 0 <= threshold < float("inf"):
        raise ArgumentError(f"threshold is {threshold}; a number from 0 on is allowed")
    before, after = (_by_key(report.records) for report in (old, new))
    found: list[Change] = []
    for key in dict.fromkeys((*before, *after)):
        found += _of_case(key, before.get(key), after.get(key), threshold, seed)
    return found


def _by_key(records: Sequence[Record]) -> dict[tuple[str, str, str, str], Record]:
    return {(record.suite, record.case, record.provider, record.executor): record for record in records}


def _of_case(key: Key, old: Record | None, new: Record | None, threshold: float, seed: int) -> Iterator[Change]:
    if old is None or old.error:
        if new is not None and not new.error:
            yield Change(*key, "", None, None, None, None, "new")
        return
    if new is None or new.error:
        yield Change(*key, "", None, new.error if new else None, None, None, "failed" if new else "missing")
        return
    for metric in dict.fromkeys((*old.metrics, *new.metrics)):
        values = old.metrics.get(metric), new.metrics.get(metric)
        if metric in old.samples and metric in new.samples:
            yield _of_samples(key, metric, values, old.samples[metric], new.samples[metric], threshold, seed)
        elif _FROM_TIMES.fullmatch(metric):
            if _TIMES.fullmatch(metric) and not (old.samples or new.samples) and metric not in ("best_us", "cpu_us"):
                verdict = "equal" if values[0] == values[1] else "unclear"  # a median alone says little
                yield Change(*key, metric, *values, _ratio(*values), None, verdict)
        elif not (_is_ratio_of_times(old) and metric == "ratio"):
            yield Change(*key, metric, *values, _ratio(*values), None, "equal" if values[0] == values[1] else "changed")


def _is_ratio_of_times(record: Record) -> bool:
    return "time_us" in record.metrics


def _of_samples(
    key: Key,
    metric: str,
    values: tuple[Value, Value],
    old: Sequence[float],
    new: Sequence[float],
    limit: float,
    seed: int,
) -> Change:
    """The ratio of two medians, with the interval in which it lies."""
    from scipy import stats  # here alone: its import takes longer than all of this

    def ratio(x: Any, y: Any, axis: int) -> Any:
        return np.median(x, axis=axis) / np.median(y, axis=axis)

    middle = float(ratio(np.asarray(new), np.asarray(old), 0))
    interval = (middle, middle)
    if min(len(old), len(new)) > 1 and (min(old) < max(old) or min(new) < max(new)):
        drawn = stats.bootstrap(
            (new, old),
            ratio,
            vectorized=True,
            n_resamples=RESAMPLES,
            confidence_level=CONFIDENCE,
            method="percentile",
            random_state=np.random.default_rng(seed),
        )
        interval = float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)
    low, high = interval
    verdict = "unclear"
    if low > 1 + limit:
        verdict = "slower"
    elif high < 1 / (1 + limit):
        verdict = "faster"
    elif low >= 1 / (1 + limit) and high <= 1 + limit:
        verdict = "alike"
    if min(len(old), len(new)) < 2:
        verdict = "unclear"  # nobody knows how far single times lie apart
    shown = significant(low, 3), significant(high, 3)
    return Change(*key, metric, values[0], values[1], significant(middle, 3), shown, verdict)


def _ratio(old: Value, new: Value) -> float | None:
    numbers = [value for value in (old, new) if isinstance(value, int | float) and not isinstance(value, bool)]
    return significant(numbers[1] / numbers[0], 4) if len(numbers) == 2 and numbers[0] else None
