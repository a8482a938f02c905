"""Rules that every kernel source obeys."""

from __future__ import annotations

import re

import pytest

from cuattn.compile.expand import KERNELS

SOURCES = sorted(KERNELS.rglob("*.cu*"))
ENTRY = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(")
CODE_BARRIER = re.compile(r"__sync(threads|warp)(_\w+)?\s*\(")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_barrier_says_what_it_orders(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    silent = []
    for number, line in enumerate(lines):
        if not CODE_BARRIER.search(line.split("//")[0]):
            continue
        above = number
        while above > 0 and lines[above - 1].lstrip().startswith("//"):
            above -= 1
        if not any("SYNC:" in comment for comment in lines[above : number + 1]):
            silent.append(number + 1)
    assert silent == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_lines_are_at_most_120_wide(path):
    text = path.read_text(encoding="utf-8")
    assert [number for number, line in enumerate(text.splitlines(), 1) if len(line) > 120] == []


@pytest.mark.parametrize("path", [path for path in SOURCES if path.suffix == ".cu"], ids=lambda path: path.name)
def test_kernels_have_names_of_this_package(path):
    entries = ENTRY.findall(path.read_text(encoding="utf-8"))
    assert entries and all(name.startswith("cuattn_") for name in entries)


@pytest.mark.parametrize(
    ("words", "places"),
    [
        (r"window_left|window_right|\bBOUND_LEFT\b", {"mask.cuh", "attention_params.cuh"}),
        (r"\bsoftcap\b|\bbias_value\b|\bg_mask\[", {"logits.cuh", "attention_params.cuh"}),
    ],
    ids=["by position", "by element"],
)
def test_what_happens_to_a_logit_is_told_in_one_place(words, places):
    naming = set()
    for path in SOURCES:
        code = [line.split("//")[0] for line in path.read_text(encoding="utf-8").splitlines()]
        if any(re.search(words, line) and "static_assert" not in line for line in code):
            naming.add(path.name)
    assert naming == places
