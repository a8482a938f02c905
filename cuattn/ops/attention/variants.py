"""Which options a forward kernel is compiled with. One that is not compiled in costs nothing.

Every combination of options would be hundreds of kernels for each dtype and head dim. So there is a kernel for each
single option, with or without bounds by position; a call with two or more of them takes the kernel that has them all,
where those that the call does not use are skipped at run time. So does a call with dropout whose part of the mask does
not lie as tensor cores would have it.

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
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

from cuattn.dtypes import ELEMENT_TYPES

__all__ = ["EVERYTHING", "LOGIT_FLAGS", "PLAIN", "ForwardOptions", "bounded", "compiled_options"]


def _score(*, logits: bool = True, natural: bool = False) -> Any:
    """Declare a flag of what happens to scores: ``logits`` before the softmax, ``natural`` if logits are not base 2."""
    return field(default=False, metadata={"logits": logits, "natural": natural})


@dataclass(frozen=True, slots=True)
class ForwardOptions:
    """The options of a call, or those that a kernel is compiled with.

    Attributes
    ----------
    bound_left, bound_right : bool
        Keys before, or after, some position relative to the query are hidden: windows and causal masks.
    chunk : bool
        Keys of other chunks are hidden. Portable kernels do that wherever both bounds are; the Hopper kernel has a form
        of its own for it.
    softcap, alibi, bias, mask, dropout : bool
        As in `cuattn.attention`.
    bias_dtype : str
        Of the bias; "float32" when there is none.
    """

    bound_left: bool = False
    bound_right: bool = False
    chunk: bool = False
    softcap: bool = _score(natural=True)
    alibi: bool = _score(natural=True)
    bias: bool = _score(natural=True)
    mask: bool = _score()
    dropout: bool = _score(logits=False)
    bias_dtype: str = "float32"

    def compiled(self, *, dropout_by_element: bool = False) -> ForwardOptions:
        """Return the options of the kernel that serves a call with these.

        ``dropout_by_element``: the part of the mask that the call has is not made of whole blocks (philox.cuh).
        """
        return _compiled(self, dropout_by_element)

    @property
    def on_scores(self) -> bool:
        """Whether scores go through anything between the product and the softmax, or after it."""
        return self.num_on_scores > 0

    @property
    def num_on_scores(self) -> int:
        return sum(getattr(self, name) for name in _SCORE_OPTIONS)

    @property
    def natural_logits(self) -> bool:
        """Whether the kernel keeps natural logits instead of base-2 ones (attention/online_softmax.cuh)."""
        return any(getattr(self, name) for name in _NATURAL)

    @property
    def label(self) -> str:
        """The names of the options, joined by underscores: "plain", "causal", "window_softcap", "everything"."""
        if self == replace(EVERYTHING, bias_dtype=self.bias_dtype):
            return f"everything_{self.bias_dtype}"
        names = ["chunk"] if self.chunk else ["window"] if self.bound_left else ["causal"] if self.bound_right else []
        names += [name for name in _SCORE_OPTIONS if getattr(self, name)]
        return "_".join(f"bias_{self.bias_dtype}" if name == "bias" else name for name in names) or "plain"

    def constants(self) -> dict[str, Any]:
        """Return the options as compile-time constants of a kernel."""
        flags = {f.name.upper(): getattr(self, f.name) for f in fields(self) if f.name not in ("chunk", "bias_dtype")}
        return {**flags, "BiasElement": ELEMENT_TYPES[self.bias_dtype]}


_SCORE_OPTIONS = tuple(f.name for f in fields(ForwardOptions) if f.metadata)
#: Those that a logit goes through before the softmax.
LOGIT_FLAGS = tuple(f.name for f in fields(ForwardOptions) if f.metadata.get("logits"))
_NATURAL = tuple(f.name for f in fields(ForwardOptions) if f.metadata.get("natural"))
PLAIN = ForwardOptions()
EVERYTHING = ForwardOptions(**dict.fromkeys(("bound_left", "bound_right", *_SCORE_OPTIONS), True))  # type: ignore[arg-type]


@cache
def _compiled(options: ForwardOptions, dropout_by_element: bool) -> ForwardOptions:
    if options.num_on_scores > 1 or dropout_by_element:
        return replace(EVERYTHING, bias_dtype=options.bias_dtype)
    return bounded(replace(options, chunk=False))


def bounded(options: ForwardOptions) -> ForwardOptions:
    """Add the right bound where there is a left one: no kernel is compiled with that alone."""
    return replace(options, bound_right=options.bound_left or options.bound_right)


def compiled_options(bias_dtypes: Sequence[str] = tuple(ELEMENT_TYPES)) -> list[ForwardOptions]:
    """List every set of options that some call needs a kernel for, plain first."""
    flags: list[dict[str, Any]] = [{name: True} for name in _SCORE_OPTIONS if name != "bias"]
    singles = [PLAIN, *(replace(PLAIN, **flag) for flag in flags)]
    singles += [ForwardOptions(bias=True, bias_dtype=dtype) for dtype in bias_dtypes]
    bounds = ((False, False), (False, True), (True, True))
    result = [replace(single, bound_left=left, bound_right=right) for single in singles for left, right in bounds]
    return result + [replace(EVERYTHING, bias_dtype=dtype) for dtype in bias_dtypes]
