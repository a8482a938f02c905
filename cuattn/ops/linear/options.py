"""The options of linear attention, as forward and gradients take them, and the checks of those that are no arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from cuattn.errors import ArgumentError
from cuattn.scalars import as_integer, check_flag, choice, real

__all__ = ["CHUNKS", "FEATURE_MAPS", "FeatureMap", "LinearKeywords", "LinearOptions", "check_options"]

FeatureMap = Literal["elu1", "relu", "square"]
#: The feature maps in the order of ``enum FeatureMap`` of kernels/linear/feature_map.cuh.
FEATURE_MAPS = (None, "elu1", "relu", "square")
#: Tokens of a chunk that a call may ask for.
CHUNKS = (16, 32, 64, 128)


class LinearKeywords(TypedDict, total=False):
    """The keywords of `cuattn.linear_attention` but the one that its result depends on."""

    causal: bool
    feature_map: FeatureMap | None
    normalize: bool
    eps: float
    scale: float | None
    decay: Any
    initial_state: Any
    chunk: int | None
    out: Any
    state_out: Any


@dataclass(frozen=True, slots=True)
class LinearOptions:
    """Options that have passed every check."""

    causal: bool
    feature_map: str | None
    normalize: bool
    eps: float
    scale: float
    chunk: int | None


def check_options(
    head_dim: int, *, causal: Any, feature_map: Any, normalize: Any, eps: Any, scale: Any, chunk: Any
) -> LinearOptions:
    """Check options that are no arrays. Raises `ArgumentError` or `NonFiniteError`.

    >>> check_options(64, causal=True, feature_map=None, normalize=False, eps=0, scale=None, chunk=None).scale
    0.125
    """
    causal, normalize = check_flag("causal", causal), check_flag("normalize", normalize)
    if feature_map is not None:
        feature_map = choice("feature_map", feature_map, FEATURE_MAPS[1:], optional=True)
    if scale is None:
        factor = 1.0 if normalize else 1.0 / math.sqrt(head_dim)
    else:
        factor = real("scale", scale, optional=True)
    if chunk is not None and as_integer(chunk) not in CHUNKS:
        raise ArgumentError(f"chunk is {chunk!r}; allowed are None and {', '.join(map(str, CHUNKS))}")
    return LinearOptions(causal, feature_map, normalize, real("eps", eps), factor, as_integer(chunk))
