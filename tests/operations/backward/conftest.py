"""Fixtures of the tests of gradients."""

from __future__ import annotations

import pytest
from backward_formats import FORMATS


@pytest.fixture(params=["float16", "tf32", "float32"])
def format_(request):
    """A dtype, and the options that ask for a format of its products."""
    _, dtype, options = FORMATS[request.param]
    return dtype, options
