"""The table of options, what is written out beside it, and what reads it: they say the same."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import numpy as np
import pytest

import cuattn
from cuattn.errors import ArgumentError
from cuattn.ops.attention.operation import Operation
from cuattn.ops.attention.options import KEYWORDS, OPTIONS, AttentionOptions, Options
from cuattn.ops.attention.params import forward_layout
from cuattn.ops.attention.signatures import entries
from cuattn.ops.attention.variants import ForwardOptions
from cuattn.runtime.declarations import of_kernel
from cuattn.runtime.executor import executor_for
from cuattn.testing.option_strategies import STRATEGIES

PAGE = Path(__file__).parents[3] / "docs" / "kernels" / "attention_forward.md"
#: The family of each public function that takes options.
FUNCTIONS = {
    "attention": "attention",
    "attention_varlen": "attention",
    "standard_attention": "attention",
    "attention_backward": "gradients",
    "attention_varlen_backward": "gradients",
    "attention_backward_workspace_size": "gradients",
    "differential_attention": "differential",
    "differential_attention_backward": "differential",
    "differential_decode": "differential_decode",
    "decode_attention": "decode",
    "paged_attention": "decode",
    "paged_attention_varlen": "decode",
    "cascade_attention": "cascade",
    "plan_decode": "plan",
}
functions = pytest.mark.parametrize("name", FUNCTIONS)


def parameters(name):
    return inspect.signature(getattr(cuattn, name)).parameters


def test_the_signature_of_attention_is_the_table():
    own = parameters("attention")
    options = [p for name, p in own.items() if name not in ("q", "k", "v", "fp8_format", "out", "return_lse")]
    table = {keyword: default for row in OPTIONS for keyword, default in row.keywords.items()}
    assert [(p.name, p.default) for p in options] == list(table.items())
    types = {name: annotation.__forward_arg__ for name, annotation in AttentionOptions.__annotations__.items()}
    assert {p.name: p.annotation for p in options} == types


@pytest.mark.parametrize("family", KEYWORDS)
def test_the_typed_dict_of_a_family_has_its_rows(family):
    keywords = {keyword for row in OPTIONS if family in row.on for keyword in row.keywords}
    assert KEYWORDS[family].__annotations__.keys() == keywords
    assert all(row.on <= KEYWORDS.keys() for row in OPTIONS)


@functions
def test_a_function_shows_every_option(name):
    """In the order of the table, with the default and the type of attention, and with a description."""
    operation, own, of_attention = Operation(name, FUNCTIONS[name]), parameters(name), parameters("attention")
    assert [name for name in own if name in of_attention and name in operation.defaults] == list(operation.defaults)
    for keyword, default in operation.defaults.items():
        assert own[keyword].kind is inspect.Parameter.KEYWORD_ONLY
        assert (own[keyword].default, own[keyword].annotation) == (default, of_attention[keyword].annotation)
    docstring = inspect.getdoc(getattr(cuattn, name))
    assert "**options" not in docstring
    assert operation.defaults.keys() <= entries(docstring).keys()
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own.values())


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "attention"])
@pytest.mark.parametrize("keyword", ("color", "operation", "names", "config"))
def test_an_unknown_keyword_is_named_before_anything_else(name, keyword):
    required = [p for p in parameters(name).values() if p.default is inspect.Parameter.empty]
    given = {p.name: object() for p in required}
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument '{keyword}'$"):
        getattr(cuattn, name)(**given, **{keyword: 1})


@pytest.mark.parametrize(
    ("name", "keyword"), (("attention_backward", "q_descale"), ("decode_attention", "bias"), ("plan_decode", "softcap"))
)
def test_options_of_another_family_are_unknown(name, keyword):
    required = [p.name for p in parameters(name).values() if p.default is inspect.Parameter.empty]
    with pytest.raises(TypeError, match=rf"^{name}\(\) .* '{keyword}'$"):
        getattr(cuattn, name)(**dict.fromkeys(required), **{keyword: None})


def test_kernels_know_what_the_table_says():
    struct = set(forward_layout(np.float32).dtype.names)
    assert Options().fields.keys() <= struct
    flags = {row.flag for row in OPTIONS if row.flag is not None}
    of_kernels = {f.name for f in dataclasses.fields(ForwardOptions)}
    assert of_kernels == flags | {"bound_left", "bound_right", "chunk", "bias_dtype"}
    entries_of_one = (f"cuattn_attention_{name}" for name in ("scores", "probabilities", "output"))
    arguments = {p.name for entry in entries_of_one for p in of_kernel("attention_standard").parameters(entry)}
    assert {row.pointer for row in OPTIONS if row.pointer is not None} <= arguments


def test_every_option_is_drawn_and_on_the_page():
    names = {row.name for row in OPTIONS}
    assert STRATEGIES.keys() == names | {"num_splits"}
    table = PAGE.read_text(encoding="utf-8").partition("| option | when |")[2].partition("\n\n")[0]
    listed = [row.split("|")[1].strip().split(", ") for row in table.splitlines()[2:]]
    assert names <= {name for row in listed for name in row}


@pytest.mark.parametrize("name", ("attention", "paged_attention"))
def test_calls_without_options_share_what_has_been_checked(name):
    operation = Operation(name, FUNCTIONS[name])
    call = {"logits_shape": (2, 4, 8, 8), "num_kv_heads": 4, "dtype": np.dtype(np.float16)}

    def check(**options):
        return operation.check(options, executor_for(x=np.zeros(1)), **call)

    assert check() is check(**operation.defaults) is check(**{**operation.defaults, "scale": None})
    assert check(softcap=3.0) is check(softcap=3.0) is not check(softcap=4.0)
    assert check(window=(1, 0)).bounds[:2] == (1, 0)
    for window in ((True, 0), (1.0, 0), (1, False)):  # equal to one that is known
        with pytest.raises(ArgumentError, match="window is"):
            check(window=window)
    slopes = np.ones(4, np.float32)
    assert check(alibi_slopes=slopes) is not check(alibi_slopes=slopes)
