"""Which options a forward kernel is compiled with. One that is not compiled in costs nothing.

Every combination of options would be hundreds of kernels for each dtype and head dim. So there is a kernel for each
single option, with or without bounds by position; a call with two or more of them takes the kernel that has them all,
where those that the call does not use are skipped at run time.

Examples
--------
>>> ForwardOptions(softcap=True).compiled() == ForwardOptions(softcap=True)
True
>>> ForwardOptions(softcap=True, alibi=True).compiled().dropout
True
>>> len(compiled_options(bias_dtypes=("float32",)))
19
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

__all__ = ["ELEMENT_TYPES", "PLAIN", "ForwardOptions", "compiled_options"]

#: Types of a bias in CUDA C, by dtype name.
ELEMENT_TYPES = {"float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float", "float64": "double"}
_SCORE_OPTIONS = ("softcap", "alibi", "bias", "mask", "dropout")


@dataclass(frozen=True, slots=True)
class ForwardOptions:
    """The options of a call, or those that a kernel is compiled with.

    Attributes
    ----------
    bound_left, bound_right : bool
        Keys before, or after, some position relative to the query are hidden: windows and causal masks.
    softcap, alibi, bias, mask, dropout : bool
        As in `cuattn.attention`.
    bias_dtype : str
        Of the bias; "float32" when there is none.
    """

    bound_left: bool = False
    bound_right: bool = False
    softcap: bool = False
    alibi: bool = False
    bias: bool = False
    mask: bool = False
    dropout: bool = False
    bias_dtype: str = "float32"

    def compiled(self) -> ForwardOptions:
        """The options of the kernel that serves a call with these."""
        return _compiled(self)

    @property
    def on_scores(self) -> bool:
        """Whether scores go through anything between the product and the softmax, or after it."""
        return any(getattr(self, name) for name in _SCORE_OPTIONS)

    @property
    def natural_logits(self) -> bool:
        """Whether the kernel keeps natural logits instead of base-2 ones (attention/online_softmax.cuh)."""
        return self.softcap or self.alibi or self.bias

    @property
    def label(self) -> str:
        """The names of the options, joined by underscores: "plain", "causal", "window_softcap", "everything"."""
        if self == replace(EVERYTHING, bias_dtype=self.bias_dtype):
            return f"everything_{self.bias_dtype}"
        names = ["window"] if self.bound_left else ["causal"] if self.bound_right else []
        names += [name for name in _SCORE_OPTIONS if getattr(self, name)]
        return "_".join(f"bias_{self.bias_dtype}" if name == "bias" else name for name in names) or "plain"

    def constants(self) -> dict[str, Any]:
        """As compile-time constants of a kernel."""
        flags = {f.name.upper(): getattr(self, f.name) for f in fields(self) if f.name != "bias_dtype"}
        return {**flags, "BiasElement": ELEMENT_TYPES[self.bias_dtype]}


PLAIN = ForwardOptions()
EVERYTHING = ForwardOptions(True, True, True, True, True, True, True)


@cache
def _compiled(options: ForwardOptions) -> ForwardOptions:
    if sum(getattr(options, name) for name in _SCORE_OPTIONS) > 1:
        return replace(EVERYTHING, bias_dtype=options.bias_dtype)
    return replace(options, bound_right=options.bound_left or options.bound_right)


def compiled_options(bias_dtypes: Sequence[str] = tuple(ELEMENT_TYPES)) -> list[ForwardOptions]:
    """Every set of options that some call needs a kernel for, plain first."""
    flags: list[dict[str, Any]] = [{name: True} for name in _SCORE_OPTIONS if name != "bias"]
    singles = [PLAIN, *(replace(PLAIN, **flag) for flag in flags)]
    singles += [ForwardOptions(bias=True, bias_dtype=dtype) for dtype in bias_dtypes]
    bounds = ((False, False), (False, True), (True, True))
    result = [replace(single, bound_left=left, bound_right=right) for single in singles for left, right in bounds]
    return result + [replace(EVERYTHING, bias_dtype=dtype) for dtype in bias_dtypes]
