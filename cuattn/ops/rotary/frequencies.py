"""rope_frequencies: tables of cosines and sines, for models that stretch their context.

* Shouyuan Chen, Sherman Wong, Liangjian Chen and Yuandong Tian, "Extending context window of large language models via
  positional interpolation", 2023 (arXiv:2306.15595).
* Bowen Peng, Jeffrey Quesnelle, Honglu Fan and Enrico Shippole, "YaRN: efficient context window extension of large
  language models", 2023 (arXiv:2309.00071); it also describes the NTK-aware base.
* Llama team, "The Llama 3 herd of models", 2024 (arXiv:2407.21783).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuattn.allocation import allocating
from cuattn.errors import ArgumentError, ShapeError
from cuattn.messages import shown
from cuattn.ops.rotary.arguments import DEFAULT_BASE, check_base, check_rotary_dim
from cuattn.runtime.executor import executor_of_module
from cuattn.scalars import MAX_EXTENT, as_integer, check_flag, choice, integer, real
from cuattn.typing import Scaling

__all__ = ["rope_frequencies"]

Frequencies = NDArray[np.float64]


def rope_frequencies(
    rotary_dim: int,
    max_seqlen: int,
    *,
    base: float = DEFAULT_BASE,
    scaling: Scaling | None = None,
    factor: float | None = None,
    original_max_position: int | None = None,
    low_freq_factor: float | None = None,
    high_freq_factor: float | None = None,
    beta_fast: float | None = None,
    beta_slow: float | None = None,
    truncate: bool | None = None,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    array_module: ModuleType = np,
) -> tuple[Any, Any]:
    """Return cosines and sines of every position, for ``rope(..., cos=cos, sin=sin)``.

    Without scaling, pair i turns by f_i = base ** (-2i / rotary_dim) radians a position, as in `rope`.

    Parameters
    ----------
    rotary_dim : int, even, 2 to 512
    max_seqlen : int
        Positions 0 to max_seqlen - 1 are in the tables.
    base : float, at least 1
    scaling : {None, "linear", "ntk", "yarn", "llama3"}
        ``"linear"``: f_i / factor (position interpolation). ``"ntk"``: base * factor ** (r / (r - 2)), with r =
        rotary_dim, so that the last pair is interpolated and the first one is not. ``"yarn"``: pairs that turn often
        within the original context keep f_i, those that turn seldom get f_i / factor, those between are blended.
        ``"llama3"``: likewise, blended by wavelength. An option of another scaling than the chosen one is an error.
    factor : float, at least 1
        How many times longer the context gets. Needed for linear, ntk and yarn; llama3: 8 by default.
    original_max_position : int
        The context that the model was trained on. Needed for yarn; llama3: 8192 by default.
    low_freq_factor, high_freq_factor : float
        llama3: with L = original_max_position, wavelengths (2 pi / f_i) above L / low_freq_factor are interpolated,
        those below L / high_freq_factor are kept; 1 and 4 by default.
    beta_fast, beta_slow : float
        yarn: pairs with beta_fast or more turns in the original context are kept, those with beta_slow or fewer are
        interpolated; 32 and 1 by default.
    truncate : bool
        yarn: the ends of the blended range are rounded outwards to whole pairs, as in the authors' code; True by
        default.
    attention_factor : float
        yarn: what cosines and sines are multiplied by, in place of a temperature of the softmax;
        0.1 * ln(factor) + 1 by default.
    mscale, mscale_all_dim : float
        yarn: the default of ``attention_factor`` becomes m(mscale) / m(mscale_all_dim) with m(s) =
        0.1 * s * ln(factor) + 1.
    array_module : module
        numpy, or cupy for tables on the current device.

    Returns
    -------
    cos, sin : arrays [max_seqlen, rotary_dim / 2], float32
        Computed in float64.

    Raises
    ------
    ArgumentError
        A value out of its range, an unknown ``scaling``, an option that is missing or belongs to another scaling.
    ShapeError
        ``max_seqlen`` of 2**31 or more.
    ArrayTypeError
        ``array_module`` is neither ``numpy`` nor ``cupy``.
    OutOfMemoryError
        The host has not got the memory for so many positions.

    References
    ----------
    Su et al., "RoFormer", 2021; Chen et al., "Extending context window of large language models via positional
    interpolation", 2023; Peng et al., "YaRN", 2023; Llama team, "The Llama 3 herd of models", 2024.

    Examples
    --------
    >>> import cuattn
    >>> cos, sin = cuattn.rope_frequencies(4, 3, scaling="linear", factor=2)
    >>> sin.round(4)
    array([[0.    , 0.    ],
           [0.4794, 0.005 ],
           [0.8415, 0.01  ]], dtype=float32)
    """
    options = dict(
        factor=factor,
        original_max_position=original_max_position,
        low_freq_factor=low_freq_factor,
        high_freq_factor=high_freq_factor,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=truncate,
        attention_factor=attention_factor,
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
    )
    frequencies, multiplier = scaled_frequencies(rotary_dim, base, scaling, options)
    number = as_integer(max_seqlen)
    if number is None or number < 0:
        raise ArgumentError(f"max_seqlen is {shown(max_seqlen)}; an integer of at least 0 is allowed")
    if number > MAX_EXTENT:
        raise ShapeError(f"max_seqlen is {shown(max_seqlen)}; at most {MAX_EXTENT} is allowed")
    executor_of_module(array_module)
    with allocating("a table for max_seqlen", 16 * number * frequencies.size):  # angles, and one function of them
        angles = np.arange(number, dtype=np.float64)[:, None] * frequencies
        cos, sin = ((multiplier * function(angles)).astype(np.float32) for function in (np.cos, np.sin))
    return array_module.asarray(cos), array_module.asarray(sin)


def scaled_frequencies(
    rotary_dim: int, base: float, scaling: str | None, options: Mapping[str, Any]
) -> tuple[Frequencies, float]:
    """Return radians a position of each pair, float64 [rotary_dim / 2], and the factor of cosines and sines."""
    rotary_dim, base = check_rotary_dim(rotary_dim), check_base(base)
    if scaling is not None:
        choice("scaling", scaling, _SCALINGS, optional=True)
    function, defaults = (_plain, {}) if scaling is None else _SCALINGS[scaling]
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if name not in defaults:
            raise ArgumentError(f"{name} is {shown(value)}, which scaling={scaling!r} does not use")
        given[name] = _read_option(name, value)
    values = {**defaults, **given}
    missing = [name for name, value in values.items() if value is _NEEDED]
    if missing:
        raise ArgumentError(f"scaling={scaling!r} needs {' and '.join(missing)}")
    return function(rotary_dim, base, **values)


def _read_option(name: str, value: Any) -> bool | int | float:
    if name == "truncate":
        return check_flag(name, value)
    if name == "original_max_position":
        return integer(name, value, 1, MAX_EXTENT, optional=True)
    low = {"factor": 1.0, "mscale": 0.0, "mscale_all_dim": 0.0}.get(name, math.ulp(0.0))
    rule = f"a finite number {'above 0' if 0 < low < 1 else f'of at least {low:g}'} is allowed"
    return real(name, value, rule, lambda number: number >= low, optional=True)


def _powers(rotary_dim: int, base: float) -> Frequencies:
    return np.asarray(base ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim))


def _plain(rotary_dim: int, base: float) -> tuple[Frequencies, float]:
    return _powers(rotary_dim, base), 1.0


def _linear(rotary_dim: int, base: float, *, factor: float) -> tuple[Frequencies, float]:
    return _powers(rotary_dim, base) / factor, 1.0


def _ntk(rotary_dim: int, base: float, *, factor: float) -> tuple[Frequencies, float]:
    if rotary_dim == 2:
        raise ArgumentError("rotary_dim is 2; scaling='ntk' spreads the factor over the pairs and needs at least 4")
    return _powers(rotary_dim, base * factor ** (rotary_dim / (rotary_dim - 2))), 1.0


def _llama3(
    rotary_dim: int,
    base: float,
    *,
    factor: float,
    original_max_position: int,
    low_freq_factor: float,
    high_freq_factor: float,
) -> tuple[Frequencies, float]:
    if low_freq_factor >= high_freq_factor:
        raise ArgumentError(
            f"low_freq_factor is {low_freq_factor} and high_freq_factor {high_freq_factor}; the former must be smaller"
        )
    frequencies = _powers(rotary_dim, base)
    turns = original_max_position * frequencies / (2 * math.pi)  # in the original context
    kept = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return frequencies * (kept + (1 - kept) / factor), 1.0


def _yarn(
    rotary_dim: int,
    base: float,
    *,
    factor: float,
    original_max_position: int,
    beta_fast: float,
    beta_slow: float,
    truncate: bool,
    attention_factor: float | None,
    mscale: float | None,
    mscale_all_dim: float | None,
) -> tuple[Frequencies, float]:
    if base == 1:
        raise ArgumentError("base is 1: all pairs turn alike, and scaling='yarn' cannot tell them apart")
    if beta_slow >= beta_fast:
        raise ArgumentError(f"beta_slow is {beta_slow} and beta_fast {beta_fast}; the former must be smaller")
    if (mscale is None) != (mscale_all_dim is None):
        raise ArgumentError("mscale and mscale_all_dim go together; one of them is missing")
    if attention_factor is not None and mscale is not None:
        raise ArgumentError("attention_factor and mscale say the same twice; give one of them")

    def pair_with(turns: float) -> float:
        """The (fractional) pair that turns so often within the original context."""
        return rotary_dim * math.log(original_max_position / (2 * math.pi * turns)) / (2 * math.log(base))

    first, last = pair_with(beta_fast), pair_with(beta_slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    # A range of no width is a step; its width must only not be 0.
    kept = 1 - np.clip((np.arange(rotary_dim // 2) - first) / max(last - first, 0.001), 0, 1)
    frequencies = _powers(rotary_dim, base)

    def attention(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1

    if attention_factor is None:
        attention_factor = attention(1) if mscale is None else attention(mscale) / attention(mscale_all_dim or 0)
    return frequencies * (kept + (1 - kept) / factor), float(attention_factor)


_NEEDED = object()  # the default of an option that has none

#: Of each scaling: how it is done, and its options with their defaults.
_SCALINGS: dict[str, tuple[Callable[..., tuple[Frequencies, float]], dict[str, Any]]] = {
    "linear": (_linear, {"factor": _NEEDED}),
    "ntk": (_ntk, {"factor": _NEEDED}),
    "yarn": (
        _yarn,
        {
            "factor": _NEEDED,
            "original_max_position": _NEEDED,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": True,
            "attention_factor": None,
            "mscale": None,
            "mscale_all_dim": None,
        },
    ),
    "llama3": (
        _llama3,
        {"factor": 8.0, "original_max_position": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
}
