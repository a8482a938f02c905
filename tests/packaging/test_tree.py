"""The tree as a whole: what must not be in any file of it."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Where this checkout and its owner live: in a file of the project, such a path works on one machine only.
MACHINE_PATHS = [path for path in (ROOT, Path.home()) if path != Path(path.anchor)]
MACHINE_PATH = re.compile(rf"(?<!\w)(?:{'|'.join(re.escape(str(path)) for path in MACHINE_PATHS)})/[\w.]")
SOURCES = {".py", ".cu", ".cuh", ".c", ".h"}
MAX_LINES = 400  # of a source file, tests included: one idea each


def tracked_files() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_paths_of_one_machine() -> None:
    found = []
    for path in tracked_files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_inline_assembly_stands_in_the_files_of_instructions() -> None:
    offenders = {
        path.name
        for path in (ROOT / "cuattn/kernels").rglob("*.cu*")
        if re.search(r"\basm\b\s*(volatile)?\s*\(", path.read_text(encoding="utf-8"))
    }
    assert offenders == {"ptx.cuh", "ptx_sm90.cuh", "ptx_wgmma.cuh"}


def test_no_large_files() -> None:
    large = [str(path.relative_to(ROOT)) for path in tracked_files() if path.stat().st_size > 2**20]
    assert large == []


def test_source_files_are_short() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in tracked_files()
        if path.suffix in SOURCES
    }
    assert len(lengths) > 500
    assert {name for name, length in lengths.items() if length > MAX_LINES} == set()


def test_test_files_have_names_of_their_own() -> None:
    """Test folders are no packages: pytest imports a file by its name, and refuses the second one of a name."""
    names = Counter(path.name for path in tracked_files() if path.name.startswith("test_") and path.suffix == ".py")
    assert [name for name, count in names.items() if count > 1] == []


def test_a_folder_of_tests_runs_alone() -> None:
    """What tests of several folders share is in tests/support: a file of another folder is not found from here."""
    offenders = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / "tests").rglob("*.py")
        for name in re.findall(r"^\s*(?:from|import) (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        if not (path.parent / f"{name}.py").is_file()
    ]
    assert offenders == []
