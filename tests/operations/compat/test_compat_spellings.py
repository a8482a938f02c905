"""Options of other libraries against the table of options: each is spelled or said to be absent, and nothing else."""

from __future__ import annotations

import inspect

import pytest

import cuattn
from cuattn.compat import flash_attn, flash_attn_interface, scaled_dot_product_attention
from cuattn.compat.libraries import OPTIONS_2, OPTIONS_3, SDPA_OPTIONS
from cuattn.compat.spellings import Spelling, Spellings
from cuattn.errors import ArgumentError
from cuattn.ops.attention.options import OPTIONS

LIBRARIES = {
    "flash_attn": (OPTIONS_2, flash_attn.flash_attn_func),
    "flash_attn_interface": (OPTIONS_3, flash_attn_interface.flash_attn_func),
    "sdpa": (SDPA_OPTIONS, scaled_dot_product_attention),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_function_has_each_keyword_that_is_spelled_and_no_row_that_is_absent(library):
    spellings, function = LIBRARIES[library]
    theirs = inspect.signature(function).parameters
    for spelling in spellings.of_option.values():
        assert set(spelling.theirs) <= theirs.keys()
    for row in OPTIONS:
        if row.name in spellings.absent:
            assert not theirs.keys() & row.keywords.keys(), f"{row.name} is a keyword of {library}"


@pytest.mark.parametrize("library", LIBRARIES)
def test_defaults_of_the_library_become_defaults_of_attention(library):
    spellings, function = LIBRARIES[library]
    theirs = inspect.signature(function).parameters
    ours = inspect.signature(cuattn.attention).parameters
    for spelling in spellings.of_option.values():
        for name, value in spelling.converted(*(theirs[name].default for name in spelling.theirs)).items():
            assert value == ours[name].default, f"{spelling.theirs} of {library}"


def test_a_row_that_nobody_decided_on_is_an_error():
    absent = {row.name: "" for row in OPTIONS}
    Spellings(absent=absent)
    del absent["softcap"]
    with pytest.raises(ArgumentError, match="softcap"):
        Spellings(absent=absent)
    with pytest.raises(ArgumentError, match=r"these are not: scale$"):
        Spellings(Spelling("scale", ("softmax_scale",)), absent=absent | {"softcap": ""})
    with pytest.raises(ArgumentError, match="'scaling' is no row"):
        Spelling("scaling", ("scaling",))
