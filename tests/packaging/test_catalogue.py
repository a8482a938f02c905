"""What the families say about themselves is complete: kernels, pages, tests."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from bench.mutants import tests_of
from cuattn import catalogue, compile
from cuattn.catalogue import groups
from cuattn.ops.registry import KernelGroup

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs/kernels"
each = pytest.mark.parametrize("group", groups().values(), ids=lambda group: group.name)


def test_every_kernel_belongs_to_one_group() -> None:
    found = Counter(kernel for group in groups().values() for kernel in group.kernels)
    assert found == dict.fromkeys(compile.kernel_names(), 1)


def test_every_declaration_is_listed_and_no_name_is_there_twice() -> None:
    there = [
        path.relative_to(ROOT).with_suffix("")
        for folder in ("cuattn/ops", "cuattn/kv")
        for path in (ROOT / folder).rglob("kernels.py")
    ]
    listed = [Path(*family.__name__.split(".")) for family in catalogue.FAMILIES]
    assert sorted(listed) == sorted(there)
    assert sum(len(family.GROUPS) for family in catalogue.FAMILIES) == len(groups())


@each
def test_every_kernel_has_a_variant(group: KernelGroup) -> None:
    variants = list(group.variants())
    assert {variant.kernel for variant in variants} == set(group.kernels)
    assert len({variant.name for variant in variants}) == len(variants)


@each
def test_the_page_names_every_kernel(group: KernelGroup) -> None:
    page = (PAGES / group.page).read_text(encoding="utf-8")
    assert [kernel for kernel in group.kernels if f"{kernel}.cu" not in page] == []


@each
def test_its_tests_are_there(group: KernelGroup) -> None:
    for pattern in group.tests:
        files = tests_of.files_of(pattern)
        assert files, pattern
        for path in files:
            assert re.search(r"^def test_", path.read_text(encoding="utf-8"), re.MULTILINE), path
