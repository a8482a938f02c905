"""Shared by the tests of the benchmarks."""

from __future__ import annotations

import re

import pytest

#: An absolute path with a folder in it, which no result file may hold.
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<>])/(?:[\w.-]+/)+[\w.-]+")


@pytest.fixture
def machine_paths():
    """What of a text looks like a path of this machine; virtual paths of kernels are none."""

    def find(text: str) -> list[str]:
        return [found for found in ABSOLUTE_PATH.findall(text) if not found.startswith("/cuattn/")]

    return find
