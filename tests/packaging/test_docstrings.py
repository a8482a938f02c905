"""The examples in docstrings print what they say, and every public function has one."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

import cuattn
from cuattn.compat import flash_attn, flash_attn_interface, scaled_dot_product_attention
from cuattn.compat.flash_attn import bert_padding
from cuattn.compat.flash_attn.layers import rotary

PACKAGE = Path(cuattn.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)
FUNCTIONS = [
    *filter(inspect.isfunction, (getattr(cuattn, name) for name in cuattn.__all__)),
    *(getattr(module, name) for module in (flash_attn, flash_attn_interface, bert_padding) for name in module.__all__),
    *(getattr(rotary, name) for name in rotary.__all__),
    scaled_dot_product_attention,
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_public_functions_have_an_example(function: object) -> None:
    assert ">>> " in (inspect.getdoc(function) or "").partition("Examples\n--------\n")[2]


@pytest.mark.parametrize("folder", ("cuattn", "bench", "cli", "examples"))
def test_docstrings_do_not_begin_in_the_middle_of_a_sentence(folder: str) -> None:
    """They say what a thing is or does: "The keys of a tile.", not "Of a tile."."""
    fragment = re.compile(r"(Of|As|That of|Those|Likewise|Until|At|By|From|To|Such|None)\b[^.]* ")
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for path in sorted((PACKAGE.parent / folder).rglob("*.py")):
        nodes = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kinds))
        first = ((ast.get_docstring(node) or "").partition("\n")[0] for node in nodes)
        found += [f"{path.name}: {line}" for line in first if fragment.match(line)]
    assert found == []
