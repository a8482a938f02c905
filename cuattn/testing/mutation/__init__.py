"""Do the tests of a kernel notice a kernel that is wrong? Small wrong edits of its source, and what becomes of them.

`in_turn` makes the edits of a CUDA source, `Trial` runs a command on each in a copy of a folder.

>>> source = Source.of("k.cu", "void f(int n) { if (n < 3) g(n); }")
>>> [edit.apply(source.text) for edit in in_turn(source, seed=0)][:1]
['void f(int n) { if (n <= 3) g(n); }']
"""

from __future__ import annotations

import random

from cuattn.testing.mutation.operators import Edit, edits
from cuattn.testing.mutation.source import Source
from cuattn.testing.mutation.trial import Outcome, Trial, TrialError

__all__ = ["Edit", "Outcome", "Source", "Trial", "TrialError", "in_turn"]


def in_turn(source: Source, seed: int) -> list[Edit]:
    """Every edit of a source: one of each operator, then a second of each, in a seeded random order."""
    generator = random.Random(f"{seed}:{source.name}")
    groups = list(edits(source))
    for group in groups:
        generator.shuffle(group)
    ordered = [group[i] for i in range(max(map(len, groups), default=0)) for group in groups if i < len(group)]
    unique: dict[str, Edit] = {}
    for edit in ordered:
        unique.setdefault(edit.apply(source.text), edit)
    return list(unique.values())
