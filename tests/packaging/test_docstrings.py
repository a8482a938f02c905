"""The examples in docstrings print what they say, and every public function has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import cuattn
from cuattn.compat import flash_attn

MODULES = [
    module.name
    for module in pkgutil.walk_packages(cuattn.__path__, "cuattn.")
    if not module.name.endswith("__main__") and ">>> " in (inspect.getsource(importlib.import_module(module.name)))
]
PUBLIC = [
    *(value for name in cuattn.__all__ if not inspect.ismodule(value := getattr(cuattn, name))),
    *(getattr(flash_attn, name) for name in flash_attn.__all__),
    cuattn.compat.scaled_dot_product_attention,
]


@pytest.mark.parametrize("name", ["cuattn", *MODULES])
def test_examples_print_what_they_say(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("function", PUBLIC, ids=lambda function: function.__name__)
def test_public_functions_have_an_example(function: object) -> None:
    text = inspect.getdoc(function) or ""
    assert text.partition("Examples\n--------\n")[2].lstrip().startswith(">>> ") or ">>> " in text.partition("Examples")[2]
