"""Which keys a query sees."""

from __future__ import annotations


def visible(query, seqlen_q, seqlen_k, causal, window):
    """[begin, end) of the keys that a query sees, aligned at the bottom right."""
    left, right = window
    aligned = query + seqlen_k - seqlen_q
    begin = 0 if left is None else min(seqlen_k, max(0, aligned - left))
    right = 0 if causal else right
    return begin, seqlen_k if right is None else max(0, min(seqlen_k, aligned + right + 1))
