"""Which tests run which kernel variants: noted in one run of the tests, kept until anything changes."""

from __future__ import annotations

import fnmatch
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
from cuattn.compile.expand import KERNELS

ROOT = Path(__file__).resolve().parents[2]
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
_LOC_FILE = re.compile(rb'^\s*\.file\s+(\d+)\s+"(?:/cuattn/kernels/)?([^"]+)"', re.MULTILINE)
_LOC = re.compile(rb"(?:\.loc|inlined_at)\s+(\d+)\s+(\d+)\s")

_STRIDES, _LOGITS = "test_odd_strides.py", "test_extreme_logits.py"

# Kernel files to the tests of their family, below tests/operations; the first pattern that fits counts.
FAMILIES = (
    ("*softmax*", ("softmax/test_*.py",)),
    ("attention_standard", ("attention/test_standard*.py",)),
    ("attention_backward*", ("backward/test_*.py", _LOGITS)),
    ("attention_decode_reduce", ("decode/test_decode_reduce.py", "decode/test_decode_properties.py")),
    ("attention_forward_hopper", ("hopper/test_attention_hopper*.py", _LOGITS)),
    ("attention_decode*", ("decode/test_*.py", "../kv/test_append_and*.py", _STRIDES, _LOGITS)),
    ("attention*", ("attention/test_*.py", "compat/test_*.py", "test_known*.py", _STRIDES, _LOGITS)),
    ("rope*", ("rotary/test_*.py", _STRIDES)),
    ("split_qkv*", ("rotary/test_*.py", _STRIDES)),
    ("padding*", ("padding/test_*.py", "rotary/test_split_qkv*.py")),
    ("merge*", ("merge/test_*.py", _STRIDES)),
    ("append_kv*", ("../kv/test_append*.py", "../kv/test_kv_codes.py", "../kv/test_paging_on_device.py", _STRIDES)),
    ("copy_pages*", ("../kv/test_copy_pages.py", "../kv/test_paging_on_device.py", _STRIDES)),
    ("slot_mapping*", ("../kv/test_slot_mapping.py", "../kv/test_paging_on_device.py", _STRIDES)),
)


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
    """The test files of the families of these kernels; those of the backward for its own kernels only."""
    patterns: set[str] = set()
    for kernel in kernels:
        patterns |= set(next((globs for pattern, globs in FAMILIES if fnmatch.fnmatch(kernel, pattern)), ()))
    folder = ROOT / "tests/operations"
    found = {path.resolve() for pattern in patterns for path in folder.glob(pattern)}
    of_backward = any("backward" in pattern for pattern in patterns)
    return sorted(path for path in found if of_backward or "backward" not in path.name)


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
    """Of the processes that run tests: a kernel cache and a Hypothesis folder of their own."""
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
