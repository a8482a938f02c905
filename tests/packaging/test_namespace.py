"""What `cuattn.<name>` is, whatever has been imported before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import cuattn

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", cuattn.__all__)
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(cuattn, name)
    assert value.__doc__
    assert name in dir(cuattn)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        cuattn.no_such_name  # noqa: B018
    assert not hasattr(cuattn, "_no_such_name")


@pytest.mark.parametrize(
    "first",
    [
        "import cuattn.softmax, cuattn.attention",
        "from cuattn.softmax import softmax; from cuattn.attention import attention",
        "import cuattn.online_softmax",
        "cuattn.softmax; cuattn.attention",
    ],
)
def test_functions_are_not_hidden_by_their_modules(first: str) -> None:
    # Each function lives in a module of the same name, which the import system would put in its place.
    code = f"import cuattn\n{first}\nprint(type(cuattn.softmax).__name__, type(cuattn.attention).__name__)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == ["function", "function"]


def test_submodules_are_modules() -> None:
    for name in ("compile", "errors", "host", "reference", "testing", "environment"):
        assert isinstance(getattr(cuattn, name), ModuleType)
