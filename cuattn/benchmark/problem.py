"""A problem of one's own: what `cuattn-bench run --batch … --heads …` says, put on the problems of a suite.

>>> from cuattn.testing.cases import AttentionCase
>>> Problem(heads=4, kv_heads=2, causal=True).attention([AttentionCase(1, 128, 8, 64)])[0].name
'attention_b1_n128_m128_h4_g2_d64_e64_float16_causal'
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuattn.errors import ArgumentError
from cuattn.testing.cases import AttentionCase
from cuattn.testing.decode_cases import DecodeCase

__all__ = ["ATTENTION", "DECODE", "Problem"]

#: Field to the field of `AttentionCase` that it sets.
ATTENTION = {
    "batch": "batch",
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "seqlen_k": "seqlen_k",
    "head_dim_v": "head_dim_v",
    "scale": "scale",
    "causal": "causal",
    "window": "window",
    "chunk": "chunk",
    "softcap": "softcap",
    "alibi": "alibi",
    "sinks": "sinks",
    "dropout": "dropout_p",
    "bias": "bias",
    "mask": "mask",
    "precision": "precision",
}
#: Field to the field of `DecodeCase` that it sets.
DECODE = {
    "batch": "batch",
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "seqlen_k": "context",
    "queries": "seqlen_q",
    "page_size": "page_size",
    "splits": "num_splits",
    "kv_format": "kv_format",
    "window": "window",
    "softcap": "softcap",
    "sinks": "sinks",
    "scale": "scale",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """What of a problem is not left to the suite; None leaves it. Beside it `Options` has dtypes, lengths, head dims.

    `page_size` 0 is a contiguous cache; `splits` are parts of the keys of decoding, `queries` its queries a sequence.
    """

    batch: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    seqlen_k: int | None = None
    head_dim_v: int | None = None
    causal: bool | str | None = None
    scale: float | None = None
    window: tuple[int | None, int | None] | None = None
    chunk: int | None = None
    softcap: float | None = None
    alibi: bool | None = None
    sinks: bool | None = None
    dropout: float | None = None
    bias: str | None = None
    mask: str | None = None
    precision: str | None = None
    queries: int | None = None
    page_size: int | None = None
    splits: int | None = None
    kv_format: str | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The fields that are set."""
        return {
            field.name: value for field in dataclasses.fields(self) if (value := getattr(self, field.name)) is not None
        }

    def attention(self, cases: Iterable[AttentionCase]) -> list[AttentionCase]:
        """Put the problem on cases; those that are the same then are one.

        Raises
        ------
        ArgumentError
            There can be no such problem.
        """
        changed = {ATTENTION[name]: value for name, value in self.given.items() if name in ATTENTION}
        found = dict.fromkeys(dataclasses.replace(case, **changed) for case in cases)
        for case in found:
            _check_heads(case.num_heads, case.shapes["k"][2])
        return list(found)

    def decode(self, cases: Iterable[DecodeCase]) -> list[DecodeCase]:
        """Put the problem on cases; those that are the same then are one. Raises as `attention`."""
        changed = {DECODE[name]: value for name, value in self.given.items() if name in DECODE}
        found = dict.fromkeys(dataclasses.replace(case, **changed) for case in cases)
        for case in found:
            _check_heads(case.num_heads, case.num_kv_heads)
            if case.seqlen_q > case.context:
                raise ArgumentError(f"{case.seqlen_q} queries are more than the {case.context} keys, which hold theirs")
            if case.kv_format is not None and np.dtype(case.dtype) == np.float64:
                raise ArgumentError("no narrow format of a cache serves queries in float64")
        return list(found)


def _check_heads(heads: int, kv_heads: int) -> None:
    if heads % kv_heads:
        raise ArgumentError(f"{heads} query heads are no multiple of {kv_heads} key/value heads")
