"""What `cuattn.<name>` is, whatever has been imported before."""

from __future__ import annotations

from types import ModuleType

import pytest

import cuattn


@pytest.mark.parametrize("name", cuattn.__all__)
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(cuattn, name)
    assert value.__doc__
    assert name in dir(cuattn)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        cuattn.no_such_name  # noqa: B018
    assert not hasattr(cuattn, "_no_such_name")


def test_submodules_are_modules() -> None:
    for name in ("compile", "errors", "host", "reference", "testing", "environment"):
        assert isinstance(getattr(cuattn, name), ModuleType)
