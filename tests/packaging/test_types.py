"""What checkers of types make of a user's program: the types of results, and which calls are mistakes."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import cuattn
from cuattn import typing
from cuattn.dtypes import FP8_FORMATS
from cuattn.formats import KV_FORMATS
from cuattn.ops.attention.options import AttentionKeywords
from cuattn.ops.decode.keywords import CascadeKeywords, DecodeKeywords, PackedKeywords
from cuattn.ops.rotary import frequencies
from cuattn.ops.softmax.config import ALGORITHMS

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "tests/packaging/programs"
RIGHT, WRONG = PROGRAMS / "right_calls.py", PROGRAMS / "wrong_calls.py"


def marked(path: Path) -> set[int]:
    """The lines that are said to be wrong."""
    return {number for number, line in enumerate(path.read_text().splitlines(), 1) if line.endswith("# wrong")}


def errors_of_mypy(*paths: Path) -> dict[str, set[int]]:
    """Program to the lines with errors."""
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--output", "json"]
    command += ["--config-file", "", "--follow-imports", "silent", *map(str, paths)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode in (0, 1), run.stdout + run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    return {
        path.name: {row["line"] for row in rows if Path(row["file"]).name == path.name and row["severity"] == "error"}
        for path in paths
    }


def errors_of_pyright(folder: Path, *paths: Path) -> dict[str, set[int]]:
    """Program to the lines with errors."""
    for path in paths:  # beside the settings, as pyright looks for both in one folder
        shutil.copy(path, folder)
    settings = {"extraPaths": [str(ROOT)], "pythonVersion": "3.11", "typeCheckingMode": "standard"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--project", str(folder), "--pythonpath", sys.executable]
    run = subprocess.run([*command, "--outputjson"], capture_output=True, text=True, check=False)
    assert run.returncode in (0, 1), run.stdout + run.stderr
    report = json.loads(run.stdout[run.stdout.index("{") :])
    assert report["summary"]["filesAnalyzed"] == len(paths)
    rows = report["generalDiagnostics"]
    return {
        path.name: {
            row["range"]["start"]["line"] + 1
            for row in rows
            if Path(row["file"]).name == path.name and row["severity"] == "error"
        }
        for path in paths
    }


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_a_users_program(checker: str, tmp_path: Path) -> None:
    if checker == "mypy":
        found = errors_of_mypy(RIGHT, WRONG)
    else:
        found = errors_of_pyright(tmp_path, RIGHT, WRONG)
    assert marked(WRONG)
    assert found == {RIGHT.name: set(), WRONG.name: marked(WRONG)}


@pytest.mark.parametrize(
    ("literal", "names"),
    [
        (typing.Algorithm, ALGORITHMS),
        (typing.KVFormatName, KV_FORMATS),
        (typing.FP8Format, FP8_FORMATS),
        (typing.Scaling, frequencies._SCALINGS),
    ],
)
def test_annotations_name_what_there_is(literal: object, names: dict[str, object]) -> None:
    assert set(get_args(literal)) == set(names)


@pytest.mark.parametrize(
    ("function", "keywords", "besides"),
    [
        (cuattn.attention, AttentionKeywords, set()),
        (cuattn.attention_varlen, AttentionKeywords, {"max_seqlen_q", "max_seqlen_k"}),
        (cuattn.standard_attention, AttentionKeywords, {"return_probabilities"}),
        (cuattn.decode_attention, DecodeKeywords, set()),
        (cuattn.paged_attention, DecodeKeywords, set()),
        (cuattn.paged_attention_varlen, PackedKeywords, set()),
        (cuattn.cascade_attention, CascadeKeywords, set()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_overloads_take_what_functions_take(function: object, keywords: type, besides: set[str]) -> None:
    """Overloads that say what is returned name the other keywords by a TypedDict, which no checker compares."""
    parameters = inspect.signature(function).parameters.values()
    taken = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert taken == {*keywords.__annotations__, *besides, "return_lse"}
