"""Which tests run which kernel variants: noted in one run of the tests, kept until anything changes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import click

from bench.mutants.plugin import digest
from cuattn import compile as kernel_compiler
from cuattn.catalogue import groups
from cuattn.compile.expand import KERNELS

ROOT = Path(__file__).resolve().parents[2]
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
_LOC_FILE = re.compile(rb'^\s*\.file\s+(\d+)\s+"(?:/cuattn/kernels/)?([^"]+)"', re.MULTILINE)
_LOC = re.compile(rb"(?:\.loc|inlined_at)\s+(\d+)\s+(\d+)\s")


@dataclass(frozen=True)
class Test:
    """A test that passes on the unchanged kernels: how long it takes, and the variants that it runs."""

    name: str
    seconds: float
    variants: tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """A compiled kernel: its key (see plugin.variant_key), a digest of its PTX, and the source lines it is from."""

    key: str
    digest: str
    lines: frozenset[tuple[str, int]]  # (path among the kernels, line)

    @property
    def source(self) -> str:
        return str(json.loads(self.key)[0])


def includers(name: str) -> set[str]:
    """Kernels (without .cu) whose expanded source has the file ``name``."""
    return {kernel for kernel in kernel_compiler.kernel_names() if name in _closure(f"{kernel}.cu")}


def _closure(name: str) -> set[str]:
    found, pending = set(), [name]
    while pending:
        current = pending.pop()
        if current not in found and (KERNELS / current).is_file():
            found.add(current)
            pending += _INCLUDE.findall((KERNELS / current).read_text(encoding="utf-8"))
    return found


def test_files(kernels: Iterable[str]) -> list[Path]:
    """The test files of the groups of these kernels; those of the backward for its own kernels only."""
    kernels = set(kernels)
    chosen = [group for group in groups().values() if kernels.intersection(group.kernels)]
    found = {path for group in chosen for pattern in group.tests for path in files_of(pattern)}
    of_backward = any("backward" in kernel for kernel in kernels)
    return sorted(path for path in found if of_backward or "backward" not in path.name)


def files_of(pattern: str) -> list[Path]:
    """Test files of a folder, or those that a pattern fits."""
    folder = ROOT / "tests"
    return list(folder.glob(f"{pattern}/test_*.py" if (folder / pattern).is_dir() else pattern))


def notes(files: list[Path], work: Path) -> list[Test]:
    """The tests of these files that pass on the unchanged kernels: noted now, or before if nothing has changed."""
    return [test for path in files for test in _notes_of(path, work)]


def _notes_of(test_file: Path, work: Path) -> list[Test]:
    path = work / f"{test_file.stem}-{_state(test_file)}.jsonl"
    if not path.exists():
        click.echo(f"running {test_file.name} on the unchanged kernels, to see which variants each test runs")
        partial, log_path = path.with_suffix(".partial"), path.with_suffix(".log")
        partial.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.mutants.plugin"]
        environment = {**test_environment(work), "CUATTN_MUTANTS_NOTE": str(partial)}
        with open(log_path, "wb") as log:
            code = subprocess.call([*command, str(test_file)], cwd=ROOT, env=environment, stdout=log, stderr=log)
        if code not in (0, 1):
            raise click.ClickException(f"the tests do not run: see {log_path}")
        if code == 1:
            click.echo(f"some tests fail on the unchanged kernels and are left out: see {log_path}")
        partial.touch()
        partial.replace(path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Test(row["test"], row["seconds"], tuple(row["variants"])) for row in rows if row["variants"]]


def test_environment(work: Path) -> dict[str, str]:
    """Environment of processes that run tests: a kernel cache and a Hypothesis folder of their own."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "CUATTN_CACHE_DIR": str(work / "cache"),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(work / "hypothesis"),
    }


def _state(test_file: Path) -> str:
    state = hashlib.sha256()
    for path in sorted({test_file, *(ROOT / "cuattn").rglob("*.py"), *KERNELS.rglob("*.cu*")}):
        state.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return state.hexdigest()[:12]


def variants(tests: Iterable[Test]) -> dict[str, Variant]:
    """Key to variant, of everything that these tests run."""
    result: dict[str, Variant] = {}
    for key in sorted({key for test in tests for key in test.variants}):
        source, constants, arch = json.loads(key)
        ptx = kernel_compiler.build(source, constants, arch=arch, kind="ptx").image
        names = {number: name.decode() for number, name in _LOC_FILE.findall(ptx)}
        lines = frozenset((names.get(number, ""), int(line)) for number, line in _LOC.findall(ptx))
        result[key] = Variant(key, digest(ptx), lines)
    return result
