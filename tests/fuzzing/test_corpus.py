"""Calls that were wrong once are right: tests/corpus, where ``cuattn-bench fuzz`` saves what it finds."""

from __future__ import annotations

from pathlib import Path

import pytest

from cuattn.errors import ArgumentError
from cuattn.testing.fuzzing import Array, Case, Failure, How, corpus, run

CORPUS = Path(__file__).resolve().parents[1] / "corpus"
FILES = list(corpus.files(CORPUS))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_corpus(executor, path: Path) -> None:
    assert run(corpus.load(path), How(executor.name, schedules=1)).margin <= 1


def test_there_is_a_corpus() -> None:
    assert FILES


def test_a_failure_is_saved_under_a_name_of_its_own(tmp_path: Path) -> None:
    cases = [Case("softmax", {"x": Array((n, 3), "float32"), "axis": -1, "algorithm": "online"}) for n in (1, 2)]
    paths = [corpus.save(tmp_path / "new", Failure(case, "RaceError: a, b")) for case in (*cases, cases[0])]
    assert paths[0] == paths[2] != paths[1]
    assert [corpus.load(path) for path in paths[:2]] == cases
    assert "RaceError: a, b" in paths[0].read_text(encoding="utf-8")
    assert list(corpus.files(tmp_path / "new")) == sorted(paths[:2])


def test_what_cannot_be_read_or_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="cannot read"):
        corpus.load(tmp_path / "none.json")
    (tmp_path / "file").write_text("nothing")
    with pytest.raises(ArgumentError, match="no case of the fuzzer"):
        corpus.load(tmp_path / "file")
    with pytest.raises(ArgumentError, match="cannot write"):
        corpus.save(tmp_path / "file", Failure(Case("softmax"), "x"))
