"""`cuattn-bench mutants` on a small file whose test is a script: fates, refusals, and that nothing is changed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli.main import main
from cuattn.testing.mutation import Source, Trial, TrialError, in_turn

KERNEL = """extern "C" __global__ void add(int n, float* x) {
    int i = threadIdx.x;
    if (i < n) {
        x[i] += 1.0f;
    }
}
"""
#: Looks at the text as a test looks at results: it knows the bound and the sum, not the index.
TEST = """import pathlib, sys, time
text = pathlib.Path("src/k.cu").read_text()
if "#error" in text or "i <= n" in text:
    print("k.cu(1): error: this does not compile")
    sys.exit(1)
if "threadIdx.x;" not in text:
    time.sleep(60)
sys.exit("+= 1.0f" not in text)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "k.cu").write_text(KERNEL)
    (tmp_path / "check.py").write_text(TEST)
    return tmp_path


@pytest.fixture
def run(project: Path) -> Callable[..., Result]:
    def invoke(*arguments: str) -> Result:
        kernel, root = project / "src" / "k.cu", str(project)
        return CliRunner().invoke(main, ["mutants", str(kernel), "--root", root, *arguments])

    return invoke


CHECK = ("--", sys.executable, "-S", "check.py")


def test_fates(project: Path, run: Callable[..., Result]) -> None:
    result = run("--sample", "0", "--json", *CHECK)
    assert result.exit_code == 0, result.output
    ((title, rows),) = json.loads(result.stdout).items()
    fates = {row["after"]: row["fate"] for row in rows}
    assert title == "k.cu" and len(fates) == len(in_turn(Source.of("k.cu", KERNEL), 0))
    assert fates["if (i <= n) {"] == "discarded"
    assert fates["x[i] -= 1.0f;"] == "killed"
    assert "survived" in fates.values()  # the script knows nothing of the rest
    assert (project / "src" / "k.cu").read_text() == KERNEL
    assert sorted(path.name for path in project.rglob("*") if path.is_file()) == ["check.py", "k.cu"]


def test_the_summary_and_the_exit_code(run: Callable[..., Result]) -> None:
    assert run("--sample", "0", "--fail", *CHECK).exit_code == 1
    result = run("--sample", "3", *CHECK)
    assert result.exit_code == 0
    assert "of 3 mutants were noticed; " in result.stdout and "did not compile" in result.stdout
    result = run("--list", "--sample", "2")
    assert result.exit_code == 0 and "k.cu: 2 of" in result.stdout


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("--", sys.executable, "-c", "raise SystemExit(3)"), "the command fails on the file as it is"),
        (("--", sys.executable, "-c", ""), "the command succeeds without k.cu"),
        (("--", "no-such-program"), "no-such-program cannot be run: No such file"),
    ],
)
def test_what_teaches_nothing_is_refused(run: Callable[..., Result], command: tuple[str, ...], words: str) -> None:
    result = run(*command)
    assert result.exit_code == 1 and words in result.stderr and "Traceback" not in result.output


def test_wrong_arguments(run: Callable[..., Result], project: Path, tmp_path: Path) -> None:
    assert run().exit_code == 2 and "say how to test the kernel" in run().stderr
    other = tmp_path / "elsewhere"
    other.mkdir()
    with pytest.raises(TrialError, match="is not in the folder"):
        Trial(other, project / "src" / "k.cu", ["true"])
    empty = project / "empty.cu"
    empty.write_text("// nothing\n")
    result = CliRunner().invoke(main, ["mutants", str(empty), "--root", str(project), *CHECK])
    assert result.exit_code == 1 and "has nothing to edit" in result.stderr


def test_what_hangs_is_ended(project: Path) -> None:
    with Trial(project, project / "src" / "k.cu", CHECK[1:], timeout_s=1.0) as trial:
        assert trial.run(KERNEL.replace("threadIdx.x;", "threadIdx.y;")).status == "hung"
        assert trial.run(KERNEL).status == "survived"
    assert not trial._copy.exists()
