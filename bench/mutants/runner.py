"""One mutant: an overlay of the kernel folder, a process that runs the tests on it, and a verdict."""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from bench.mutants import semantic, tests_of
from bench.mutants.plugin import DIFFERS, REFUSED
from bench.mutants.server import Server
from bench.mutants.tests_of import Test, test_environment
from cuattn.compile.expand import KERNELS
from cuattn.testing.mutation import operators
from cuattn.testing.mutation.operators import Edit
from cuattn.testing.mutation.source import Source

KILLED, SURVIVED, DISCARDED = "killed", "survived", "discarded"
HUNG_LEAST_S, HUNG_FACTOR = 20.0, 10.0  # a test that takes so many times as long as it should has hung
COMPILER_S = 120.0  # for the compilations before the first test
BUSY_FACTOR = 3.0  # how much longer all this may take on a busy machine
NUM_PROBED = 12  # variants that are compiled to see whether the PTX changes at all
FIRST_TESTS = 10


@dataclass(frozen=True)
class Mutant:
    """An edit of a kernel file. The key stays the same while the line that is edited does, wherever it moves to."""

    key: str
    file: str
    line: int
    operator: str
    before: str
    after: str
    edit: Edit


@dataclass(frozen=True)
class Result:
    """What became of a mutant."""

    key: str
    file: str
    line: int
    operator: str
    before: str
    after: str
    status: str
    reason: str  # the test that failed, why it was discarded, or how many tests it survived
    seconds: float

    def row(self) -> dict[str, Any]:
        return asdict(self)


def mutants(name: str, seed: int) -> list[Mutant]:
    """Every mutant of a file: those written by hand, then the operators' in turn, each in a seeded random order."""
    source = Source.of(name, (KERNELS / name).read_text(encoding="utf-8"))
    generator = random.Random(f"{seed}:{name}")
    groups = list(operators.edits(source))
    for group in groups:
        generator.shuffle(group)
    ordered = [*semantic.edits(source)]
    for position in range(max(map(len, groups), default=0)):
        ordered += [group[position] for group in groups if position < len(group)]
    unique: dict[str, Edit] = {}
    for edit in ordered:
        unique.setdefault(edit.apply(source.text), edit)
    return _named(source, list(unique.values()))


def _named(source: Source, edits: list[Edit]) -> list[Mutant]:
    """Give mutants their names: keys tell equal edits of equal lines apart by their order in the file."""
    seen: Counter[str] = Counter()
    keys: dict[Edit, str] = {}
    for edit in sorted(edits, key=lambda edit: (edit.start, edit.end, edit.replacement)):
        what = f"{source.name}: {' => '.join(_lines(source, edit))}"
        keys[edit] = hashlib.sha256(f"{what} {seen[what]}".encode()).hexdigest()[:12]
        seen[what] += 1
    return [
        Mutant(keys[edit], source.name, source.line_of(edit.start), edit.operator, *_lines(source, edit), edit)
        for edit in edits
    ]


def _lines(source: Source, edit: Edit) -> tuple[str, str]:
    """The lines that an edit changes, before and after."""
    first, last = source.text.rfind("\n", 0, edit.start) + 1, source.text.find("\n", edit.end)
    before = source.text[first:last]
    after = source.text[first : edit.start] + edit.replacement + source.text[edit.end : last]
    return " ".join(before.split()), " ".join(after.split())


class Laboratory:
    """Runs mutants against the tests that could notice them."""

    def __init__(self, work: Path, file: str, total_s: float, patterns: Sequence[str] = ("*",)) -> None:
        """Prepare for the mutants of one kernel file; tests of files that match may run for ``total_s`` on each."""
        self.work = work
        self.total_s = total_s
        self.idle: list[Server] = []
        self.kernels = tests_of.includers(file)
        files = [
            path
            for path in tests_of.test_files(self.kernels)
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)
        ]
        self.tests = tests_of.notes(files, work)
        self.variants = tests_of.variants(self.tests)
        if not any(variant.source in self.kernels for variant in self.variants.values()):
            raise click.ClickException(f"no test that passes runs a kernel with {file} in it")

    def run(self, mutant: Mutant) -> Result:
        """Try a mutant."""
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="mutant-", dir=self.work) as scratch:
            folder = Path(scratch)
            overlay = folder / "kernels"
            shutil.copytree(KERNELS, overlay)
            text = (KERNELS / mutant.file).read_text(encoding="utf-8")
            (overlay / mutant.file).write_text(mutant.edit.apply(text), encoding="utf-8")
            status, reason = self._try(mutant, folder)
        return Result(
            mutant.key,
            mutant.file,
            mutant.line,
            mutant.operator,
            mutant.before,
            mutant.after,
            status,
            reason,
            round(time.monotonic() - began, 1),
        )

    def _try(self, mutant: Mutant, folder: Path) -> tuple[str, str]:
        """Run a mutant's tests: first those of variants that the edited line is compiled into, and quick ones first."""
        line = (mutant.file, mutant.line)
        concerned = [variant for variant in self.variants.values() if variant.source in self.kernels]
        near = {variant.key for variant in concerned if line in variant.lines}
        keys = {variant.key for variant in concerned}
        tests = [test for test in self.tests if keys.intersection(test.variants)]
        # The variant that most tests run is compiled first, and its tests run first: they compile nothing else.
        popular = Counter(key for test in tests for key in test.variants)
        probed = _spread(sorted(near or keys, key=lambda key: (-popular[key], key)), NUM_PROBED)
        tests.sort(key=lambda test: (near.isdisjoint(test.variants), len({*test.variants} - {probed[0]}), test.seconds))
        tests = [*tests[:FIRST_TESTS], *_by_function(tests[FIRST_TESTS:])]
        rows = self._run(tests, probed, folder)
        status, reason = verdict(rows)
        if status != SURVIVED:
            return status, reason
        return SURVIVED, f"{sum('passed' in row for row in rows)} of {len(tests)} tests passed"

    def _run(self, tests: list[Test], probed: list[str], folder: Path) -> list[dict[str, Any]]:
        """Run tests on the overlay; returns what the plugin wrote about them."""
        slowest = max(test.seconds for test in tests)
        log = folder / "log.jsonl"
        log.unlink(missing_ok=True)
        plan = {
            "kernels": str(folder / "kernels"),
            "tests": [test.name for test in tests],
            "hung_s": {test.name: max(HUNG_LEAST_S, HUNG_FACTOR * test.seconds) for test in tests},
            "total_s": self.total_s,
            "variants": [[key, self.variants[key].digest] for key in probed],
            "log": str(log),
        }
        path = folder / "plan.json"
        path.write_text(json.dumps(plan), encoding="utf-8")
        limit = BUSY_FACTOR * (COMPILER_S + self.total_s + max(HUNG_LEAST_S, HUNG_FACTOR * slowest))
        server = self._server()
        if server.run(path, limit):
            self.idle.append(server)
        return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []

    def _server(self) -> Server:
        """Return a server of these tests that has nothing to do."""
        with contextlib.suppress(IndexError):
            return self.idle.pop()
        files = sorted({test.name.partition("::")[0] for test in self.tests})
        handle, output = tempfile.mkstemp(prefix="output-", suffix=".txt", dir=self.work)
        os.close(handle)
        return Server(files, test_environment(self.work), Path(output))

    def close(self) -> None:
        """End the processes that run tests."""
        while self.idle:
            server = self.idle.pop()
            server.close()
            server.output.unlink(missing_ok=True)


def _by_function(tests: list[Test]) -> list[Test]:
    """Order tests by turns, one case of each function, then a second of each: they look at other things."""
    seen: Counter[str] = Counter()
    turns: dict[str, int] = {}
    for test in tests:
        function = test.name.partition("[")[0]
        turns[test.name] = seen[function]
        seen[function] += 1
    return sorted(tests, key=lambda test: turns[test.name])


def _spread(keys: list[str], most: int) -> list[str]:
    """Choose at most so many of the tests, from all parts of the list."""
    return keys[:: max(1, -(-len(keys) // most))]


def verdict(rows: list[dict[str, Any]]) -> tuple[str, str]:
    """Status and reason from the log of a run (see plugin.Run)."""
    if not rows:
        return DISCARDED, "the compiler takes too long"
    if rows[0]["probe"] != DIFFERS:
        return DISCARDED, rows[0]["probe"]
    for row in rows:
        if "failed" in row:
            if "CompileError" in row["message"]:  # another variant than the one compiled first
                return DISCARDED, REFUSED
            return KILLED, row["failed"]
    passed = [row["passed"] for row in rows if "passed" in row]
    begun = [row["begin"] for row in rows if "begin" in row]
    if len(begun) > len(passed):  # the process ended in the middle of a test
        return KILLED, f"{begun[-1]} (hung or crashed)"
    return SURVIVED, ""
