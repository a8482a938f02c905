"""What a forward launch needs to walk over a list of tiles instead of all of them: kernels/attention/tile_list.cuh.

Who makes such lists is above the kernels: block masks do (`cuattn.ops.sparse`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from cuattn.ops.attention.forward.config import FlashFwdConfig
from cuattn.ops.attention.variants import EVERYTHING, ForwardOptions

__all__ = ["ListedTiles", "listed_options"]


@dataclass(frozen=True, slots=True)
class ListedTiles:
    """The tiles that a call visits.

    Attributes
    ----------
    config : FlashFwdConfig
        The row whose tiles they are.
    options : ForwardOptions
        That the kernel is compiled with: `listed_options`.
    array : int32 array
        The list, where kernels can read it.
    work : int32 array [num_work, 2]
        (batch entry, block of queries) of each CTA of a head, those with the most tiles first.
    """

    config: FlashFwdConfig
    options: ForwardOptions
    array: Any
    work: Any


@cache
def listed_options(variant: ForwardOptions) -> ForwardOptions:
    """Return the options of the kernel that serves a call with these: none, bounds on both sides, or every option.

    Fewer variants than without a list: what is hidden by position is found in few tiles, those that a bound cuts.
    """
    if variant.on_scores:
        return replace(EVERYTHING, bias_dtype=variant.bias_dtype)
    bounded = variant.bound_left or variant.bound_right
    return replace(variant, bound_left=bounded, bound_right=bounded)
