"""The command that mutates kernels: what it edits, what it calls killed, and one real mutant of each fate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.mutants import report, runner, semantic, tests_of
from bench.mutants.__main__ import main
from bench.mutants.plugin import DIFFERS, EQUAL, REFUSED
from cuattn.compile import cache
from cuattn.compile.expand import KERNELS
from cuattn.testing.mutation import operators
from cuattn.testing.mutation.operators import Edit
from cuattn.testing.mutation.source import Source

TEXT = """#include "a.cuh"  // 1 < 2
constexpr int WIDTH = 8;
static_assert(WIDTH == 8,
              "not mutated: 3 < 4");
__device__ float f(const float* g_x, int n) {
    __shared__ float s_x[WIDTH];
    float sum = 0.0f;
    for (int i = 0; i < n; i++) sum += g_x[i] * 2.0f;
    if (n > WIDTH) sum = fmaxf(sum, g(n, sum));
    // SYNC: everything.
    __syncthreads();
    return n <= 4 ? sum : -sum;
}
"""
SOURCE = Source.of("f.cu", TEXT)


def lines(operator: operators.Operator) -> list[str]:
    """The edited lines of each edit of an operator."""
    found = []
    for edit in operator(SOURCE):
        before, after = set(TEXT.splitlines()), edit.apply(TEXT).splitlines()
        found += [" ".join(line.split()) for line in after if line not in before]
    return found


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        (operators.comparison, ["if (n >= WIDTH) sum = fmaxf(sum, g(n, sum));", "return n < 4 ? sum : -sum;"]),
        (operators.bound, ["for (int i = 0; i < n - 1; i++) sum += g_x[i] * 2.0f;"]),
        (operators.increment, ["for (int i = 0 + 1; i < n; i++) sum += g_x[i] * 2.0f;"]),
        (operators.synchronization, [";"]),
        (operators.statement, ["for (int i = 0; i < n; i++) ;", "if (n > WIDTH) ;"]),
        (operators.condition, [f"if ({x}) sum = fmaxf(sum, g(n, sum));" for x in ("true", "false")]),
        (operators.swapped_arguments, ["if (n > WIDTH) sum = fmaxf(sum, g(sum, n));"]),
        (operators.ternary, ["return n <= 4 ? -sum : sum;"]),
        (operators.negation, ["return n <= 4 ? sum : sum;"]),
        (operators.arithmetic, [
            "for (int i = 0; i < n; i++) sum -= g_x[i] * 2.0f;",
            "for (int i = 0; i < n; i++) sum += g_x[i] + 2.0f;",
        ]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_operators(operator: operators.Operator, expected: list[str]) -> None:
    assert lines(operator) == expected


def test_what_is_not_code_is_left_alone() -> None:
    edited = {SOURCE.line_of(edit.start) for group in operators.edits(SOURCE) for edit in group}
    assert edited == {2, 7, 8, 9, 11, 12} | ({6} & edited)


def test_edits_by_hand_find_their_places() -> None:
    """Nearly all of them: a kernel may change before the table does."""
    lost = []
    for entry in semantic.table():
        source = Source.of(entry.file, (KERNELS / entry.file).read_text(encoding="utf-8"))
        edit = entry.find(source)
        if edit is None:
            lost.append((entry.file, entry.what))
        else:
            assert edit.apply(source.text) != source.text, entry
    assert len(lost) <= len(semantic.table()) // 10, lost


def test_mutants_are_many_distinct_and_deterministic() -> None:
    for path in KERNELS.rglob("*.cu"):
        name = path.relative_to(KERNELS).as_posix()
        mutants = runner.mutants(name, seed=0)
        assert len(mutants) >= 15, name  # the body of the smallest lies in a header, which has mutants of its own
        assert len({mutant.key for mutant in mutants}) == len(mutants)
        assert [mutant.key for mutant in runner.mutants(name, seed=0)] == [mutant.key for mutant in mutants]
        other = runner.mutants(name, seed=1)
        assert other != mutants
        assert {mutant.key for mutant in other} == {mutant.key for mutant in mutants}


def test_keys_do_not_depend_on_what_stands_above() -> None:
    edits = [edit for group in operators.edits(SOURCE) for edit in group]
    moved = Source.of("f.cu", "// a new line\n" + TEXT)
    shift = len(moved.text) - len(TEXT)
    moved_edits = [Edit(e.operator, e.start + shift, e.end + shift, e.replacement) for e in edits]
    first, second = runner._named(SOURCE, edits), runner._named(moved, moved_edits)
    assert [mutant.key for mutant in first] == [mutant.key for mutant in second]
    assert [mutant.line + 1 for mutant in first] == [mutant.line for mutant in second]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], (runner.DISCARDED, "the compiler takes too long")),
        ([{"probe": EQUAL}], (runner.DISCARDED, EQUAL)),
        ([{"probe": REFUSED}], (runner.DISCARDED, REFUSED)),
        ([{"probe": DIFFERS}, {"begin": "a"}, {"passed": "a"}], (runner.SURVIVED, "")),
        ([{"probe": DIFFERS}, {"begin": "a"}, {"failed": "a", "message": "ToleranceError"}], (runner.KILLED, "a")),
        ([{"probe": DIFFERS}, {"begin": "a"}, {"passed": "a"}, {"begin": "b"}], (runner.KILLED, "b (hung or crashed)")),
        (
            [{"probe": DIFFERS}, {"begin": "a"}, {"failed": "a", "message": "E CompileError"}],
            (runner.DISCARDED, REFUSED),
        ),
    ],
)
def test_verdicts(rows: list[dict[str, str]], expected: tuple[str, str]) -> None:
    assert runner.verdict(rows) == expected


def test_every_kernel_has_tests() -> None:
    for path in KERNELS.rglob("*.cu"):
        kernel = path.relative_to(KERNELS).with_suffix("").as_posix()
        assert tests_of.test_files([kernel]), kernel


def test_list() -> None:
    result = CliRunner().invoke(main, ["--kernel", "softmax_state", "--list"])
    assert result.exit_code == 0
    assert "rescale" in result.output
    assert CliRunner().invoke(main, ["--kernel", "no_such"]).exit_code == 1


def mutant(before: str, after: str, name: str = "softmax/softmax_state.cuh") -> runner.Mutant:
    source = Source.of(name, (KERNELS / name).read_text(encoding="utf-8"))
    start = source.text.index(before)
    (found,) = runner._named(source, [Edit("by hand", start, start + len(before), after)])
    return found


@pytest.mark.slow
def test_one_of_each_fate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the tests that count traffic, which do not look at values."""
    (test_file,) = (tests_of.ROOT / "tests/operations/softmax").glob("test_softmax_traffic.py")
    environment = {**tests_of.test_environment(tmp_path)}
    environment["CUATTN_CACHE_DIR"] = str(cache.root())
    monkeypatch.setattr(tests_of, "test_files", lambda kernels: [test_file])
    for module in (tests_of, runner):
        monkeypatch.setattr(module, "test_environment", lambda work: dict(environment))
    laboratory = runner.Laboratory(tmp_path, "softmax/softmax_state.cuh", total_s=100.0)
    assert len(laboratory.tests) > 5
    same = laboratory.run(mutant("{ return expf(x); }", "{  return expf(x); }"))
    assert (same.status, same.reason) == (runner.DISCARDED, EQUAL)
    refused = laboratory.run(mutant("{ return expf(x); }", "{ return expf(); }"))
    assert (refused.status, refused.reason) == (runner.DISCARDED, REFUSED)
    unseen = laboratory.run(mutant("return logf(x)", "return log2f(x)"))
    assert unseen.status == runner.SURVIVED
    assert unseen.reason.startswith(f"{len(laboratory.tests)} of ")
    monkeypatch.setattr(runner, "HUNG_LEAST_S", 2.0)  # all of which passes
    hung = laboratory.run(mutant("{ return expf(x); }", "{ while (x < 1.0f) {} return x; }"))
    assert hung.status in (runner.KILLED, runner.DISCARDED)  # an endless loop without effect may be compiled away
    laboratory.close()
    results = {result.key: result for result in (same, refused, unseen, hung)}
    (tmp_path / "results.json").write_text(report.to_json(results), encoding="utf-8")
    assert report.read(tmp_path / "results.json") == results
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["mutants"]


def test_the_page_is_made_from_the_results() -> None:
    results = report.read(tests_of.ROOT / "bench/mutants/results.json")
    assert results
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.with_table(page, results) == page, "run python -m bench.mutants --page"


def test_enough_die_and_every_survivor_is_explained() -> None:
    results = report.read(tests_of.ROOT / "bench/mutants/results.json").values()
    for file, killed, survived, explained, discarded in report.counts(results):
        assert survived == explained, file
        # A short file has no twenty edits that change anything: all of them, then.
        assert killed + survived >= min(20, len(runner.mutants(file, seed=0)) - discarded), file
    total = [sum(column) for column in zip(*(line[1:3] for line in report.counts(results)), strict=True)]
    assert total[0] / sum(total) >= 0.95
