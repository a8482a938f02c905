"""A standing fuzzer: calls of every public operation, drawn, made, checked against float64, shrunk, saved, run again.

>>> case = Case("softmax", {"x": Array((2, 3), "float32"), "axis": -1, "algorithm": "online"})
>>> run(case).margin < 1
True

* :mod:`~cuattn.testing.fuzzing.case`: a call as plain data: JSON, and a program that makes it again;
* :mod:`~cuattn.testing.fuzzing.catalogue`: the operations, each with what is drawn for it;
* :mod:`~cuattn.testing.fuzzing.judge`: whether a call was right;
* :mod:`~cuattn.testing.fuzzing.engine`: rounds of Hypothesis, guided by :mod:`~cuattn.testing.fuzzing.coverage`;
* :mod:`~cuattn.testing.fuzzing.corpus`: calls that were wrong once, as files.

Needs Hypothesis. ``cuattn-bench fuzz`` is the command.
"""

from __future__ import annotations

from cuattn.testing.fuzzing.arrays import Array
from cuattn.testing.fuzzing.case import Case
from cuattn.testing.fuzzing.catalogue import OPERATIONS
from cuattn.testing.fuzzing.engine import Failure, Fuzzer
from cuattn.testing.fuzzing.judge import How, Outcome, run

__all__ = ["OPERATIONS", "Array", "Case", "Failure", "Fuzzer", "How", "Outcome", "run"]
