"""What the families say about themselves is complete: kernels, pages, tests."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

import cuattn
from bench.mutants import tests_of
from cuattn import catalogue, compile
from cuattn.catalogue import operation_of, operations
from cuattn.ops.registry import Operation

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs/kernels"
each = pytest.mark.parametrize("operation", operations().values(), ids=lambda operation: operation.name)


def test_every_kernel_belongs_to_one_operation() -> None:
    found = Counter(kernel for operation in operations().values() for kernel in operation.kernels)
    assert found == dict.fromkeys(compile.kernel_names(), 1)
    assert operation_of("softmax_split").name == "softmax"


def test_every_declaration_is_listed_and_no_name_is_there_twice() -> None:
    there = {path.relative_to(ROOT).with_suffix("") for path in Path(cuattn.__file__).parent.rglob("operation.py")}
    listed = [Path(*family.__name__.split(".")) for family in catalogue.FAMILIES]
    assert sorted(listed) == sorted(there)
    assert sum(len(family.OPERATIONS) for family in catalogue.FAMILIES) == len(operations())


@each
def test_every_kernel_has_a_variant(operation: Operation) -> None:
    variants = list(operation.variants())
    assert {variant.kernel for variant in variants} == set(operation.kernels)
    assert len({variant.name for variant in variants}) == len(variants)


@each
def test_the_page_names_every_kernel(operation: Operation) -> None:
    page = (PAGES / operation.page).read_text(encoding="utf-8")
    assert [kernel for kernel in operation.kernels if f"{kernel}.cu" not in page] == []


@each
def test_its_tests_are_there(operation: Operation) -> None:
    for pattern in operation.tests:
        files = tests_of.files_of(pattern)
        assert files, pattern
        for path in files:
            assert re.search(r"^def test_", path.read_text(encoding="utf-8"), re.MULTILINE), path
