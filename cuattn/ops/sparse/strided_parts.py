"""The strided pattern as calls of dense attention: tokens a stride apart are a sequence of their own, heads of a view.

With a = i + o the key that query i is aligned with, (i, j) is visible if a - j is a multiple of the stride. So keys of
one residue modulo the stride are seen by queries of one residue only. Tokens start, start + stride, ... of `count`
neighbouring residues are a view [batch, rows, count · heads, head_dim] of [batch, seqlen, heads, head_dim]: residues
become heads, and what is far away becomes near. No length has to be a multiple of the stride: residues that have as
many queries and keys as their neighbours go into one call, which makes at most three of them, and nothing is padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cuattn.runtime.arrays import contiguous
from cuattn.runtime.executor import Executor
from cuattn.scalars import MAX_EXTENT

__all__ = ["Group", "Layer", "layers", "lse_view", "mergeable", "usable", "view"]


@dataclass(frozen=True)
class Group:
    """Neighbouring residues that have as many queries as each other, and as many keys."""

    start_q: int  #: first query of the first residue
    rows_q: int  #: queries of each
    start_k: int
    rows_k: int
    count: int  #: residues
    stride: int
    options: dict[str, Any]  #: of the call


@dataclass(frozen=True)
class Layer:
    """Groups that have every query, and every key, once; keys that a query sees are in one layer only."""

    groups: tuple[Group, ...]

    @property
    def is_whole(self) -> bool:
        """Whether it is one call of everything, as it stands."""
        return bool(self.groups) and self.groups[0].stride == 1


def layers(
    seqlen_q: int, seqlen_k: int, shift: int, stride: int, local: int | None, *, causal: bool, shared: dict[str, Any]
) -> list[Layer]:
    """Return the layers of the pattern; query i is aligned with key i + ``shift``, ``shared`` are options of all."""
    if local is None or local <= 1:  # the key that a query is aligned with is a stride's multiple away as well
        bounds: dict[str, Any] = {"causal": True, "ahead": 0} if causal else {}
        return [_residues(seqlen_q, seqlen_k, shift, stride, shared, **bounds)]
    window = {"causal": causal, "window": (local - 1, local - 1), "diagonal_offset": shift, **shared}
    found = [Layer((Group(0, seqlen_q, 0, seqlen_k, 1, 1, window),))]
    beyond = -(-local // stride)  # strides that are not within the window
    if beyond * stride <= seqlen_q - 1 + shift:
        found.append(_residues(seqlen_q, seqlen_k, shift, stride, shared, causal=True, ahead=-beyond))
    if not causal and beyond * stride <= seqlen_k - 1 - shift:
        # A right bound that hides nothing makes it a call that is compiled for the same bounds as the window.
        behind = (0, min(2 * (seqlen_q + seqlen_k), MAX_EXTENT - 1))
        found.append(_residues(seqlen_q, seqlen_k, shift, stride, shared, window=behind, ahead=beyond))
    return found


def _residues(
    seqlen_q: int,
    seqlen_k: int,
    shift: int,
    stride: int,
    shared: dict[str, Any],
    ahead: int | None = None,
    **bounds: Any,
) -> Layer:
    """Return the groups of residues; the diagonal of ``bounds`` lies ``ahead`` rows after that of the whole."""
    edges = sorted({0, shift % stride, seqlen_k % stride, (seqlen_q + shift) % stride, stride})
    groups = []
    for first, end in pairwise(edges):
        start_q = (first - shift) % stride
        rows_q, rows_k = (max(0, -(-n // stride)) for n in (seqlen_q - start_q, seqlen_k - first))
        if rows_q or rows_k:
            own = dict(bounds)
            if ahead is not None:
                own["diagonal_offset"] = (start_q + shift - first) // stride + ahead
            groups.append(Group(start_q, rows_q, first, rows_k, end - first, stride, own | shared))
    return Layer(tuple(groups))


def mergeable(x: Any) -> bool:
    """Whether the heads of neighbouring tokens follow each other in equal steps, as axes of one view."""
    return x.shape[2] <= 1 or x.strides[1] == x.shape[2] * x.strides[2]


def usable(executor: Executor, x: Any) -> Any:
    """Return ``x`` [batch, seqlen, heads, head_dim], or a copy of which `view` has no need to make one."""
    return x if mergeable(x) else contiguous(executor, x)


def view(executor: Executor, x: Any, start: int, rows: int, group: Group) -> Any:
    """Return the tokens of a group, [batch, rows, count · heads, head_dim], of a `mergeable` array."""
    if group.stride == 1:
        return x
    batch, _, heads, dim = x.shape
    of_batch, of_token, of_head, of_dim = x.strides
    if heads <= 1:
        of_head = of_token
    shape = batch, rows, group.count * heads, dim
    return _strided(executor, x[:, start:], shape, (of_batch, group.stride * of_token, of_head, of_dim))


def lse_view(executor: Executor, lse: Any, group: Group) -> Any:
    """Return the lse of a group's queries, [batch, count, heads, rows], of that of all, [batch, heads, seqlen]."""
    batch, heads, _ = lse.shape
    of_batch, of_head, of_token = lse.strides
    shape = batch, group.count, heads, group.rows_q
    return _strided(executor, lse[:, :, group.start_q :], shape, (of_batch, of_token, of_head, group.stride * of_token))


def _strided(executor: Executor, x: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    with executor.on_device():
        return executor.xp.lib.stride_tricks.as_strided(x, shape, strides)
