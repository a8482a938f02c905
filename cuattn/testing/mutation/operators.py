"""Edits made by rule: every place of a source where a small slip of the pen gives other code.

Rules rather than a list of strings, so that they outlive the next change of a kernel.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cuattn.testing.mutation.source import Source


@dataclass(frozen=True)
class Edit:
    """``text[start:end]`` becomes ``replacement``."""

    operator: str
    start: int
    end: int
    replacement: str

    def apply(self, text: str) -> str:
        return text[: self.start] + self.replacement + text[self.end :]


Operator = Callable[[Source], Iterator[Edit]]

_COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
_ARITHMETIC = {
    "+": "-",
    "-": "+",
    "*": "+",
    "/": "*",
    "%": "/",
    "+=": "-=",
    "-=": "+=",
    "*=": "+=",
    "&&": "||",
    "||": "&&",
}
# Which of two names that are easily taken for each other.
_NAMES = (
    ("seq_stride", "head_stride"),
    ("batch_stride", "head_stride"),
    ("row_stride", "col_stride"),
    ("HEAD_DIM", "HEAD_DIM_V"),
    ("head_dim", "head_dim_v"),
    ("QK_STRIDE", "V_STRIDE"),
    ("BLOCK_M", "BLOCK_N"),
    ("MMA_M", "MMA_N"),
    ("ROWS", "COLS"),
    ("seqlen_q", "seqlen_k"),
    ("head_idx", "kv_head_idx"),
    ("num_rows", "num_cols"),
    ("row_max", "row_sum"),
    ("num_tiles", "num_full_tiles"),
    ("first_key", "first_query"),
    ("first_query", "last_query"),
    ("lane_idx", "warp_idx"),
    ("begin", "end"),
    ("min", "max"),
    ("fminf", "fmaxf"),
    ("THREADS_PER_ROW", "NUM_THREADS"),
    ("ROWS_PER_CTA", "NUM_THREADS"),
    ("NUM_WARPS", "WARP_SIZE"),
    ("true", "false"),
    ("larger", "smaller"),
    ("left", "right"),
    ("lower", "upper"),
)
_COMMUTATIVE = ("min", "max", "fmaxf", "fmax", "fminf", "maximum", "merge", "merged")
_FILLER = re.compile(r"\bhas_row \? [^:;?]* : $")  # what comes then is never used
_LOOP = re.compile(r"\bfor \([^;]*;[^;]*? (<) ([^;]*);")
_SYNC = re.compile(r"\b(?:__syncthreads|__syncwarp|cp_async_wait(?:<[^;]*>)?|cp_async_commit|end_of_row|bar_sync)\(")


def comparison(source: Source) -> Iterator[Edit]:
    """Exchange < and <=, > and >=, == and != for each other. Templates have no spaces around their brackets."""
    bounds = {match.start(1) for match in _LOOP.finditer(source.code)}
    for match in re.finditer(r"(?<= )(<=|>=|==|!=|<|>)(?= )", source.code):
        if match.start() not in bounds:
            yield Edit("comparison", *match.span(), _COMPARISONS[match[0]])


def bound(source: Source) -> Iterator[Edit]:
    """Let a loop end one step early. (One that goes on for a step more does nothing where its body has a bound.)"""
    for match in _LOOP.finditer(source.code):
        yield Edit("loop ends early", match.end(2), match.end(2), " - 1")


def arithmetic(source: Source) -> Iterator[Edit]:
    """Put another operator between the same operands."""
    for match in re.finditer(r"(?<=[\w)\]] )(\+=|-=|\*=|&&|\|\||[-+*/%])(?= [\w(*\-])", source.code):
        yield Edit("arithmetic", *match.span(), _ARITHMETIC[match[0]])


def number(source: Source) -> Iterator[Edit]:
    """Make a number one more than it should be; 0 and 1 for each other in floating point."""
    for match in re.finditer(r"(?<![\w.])(\d+)(?![\w.])", source.code):
        if not _FILLER.search(source.code, 0, match.start()):
            yield Edit("number", *match.span(), str(int(match[1]) + 1))
    for match in re.finditer(r"(?<![\w.])([01])\.0f?(?!\w)", source.code):
        yield Edit("number", match.start(1), match.end(1), str(1 - int(match[1])))


def less(source: Source) -> Iterator[Edit]:
    """Make a number one less than it should be."""
    for match in re.finditer(r"(?<![\w.])([1-9]\d*)(?![\w.])", source.code):
        yield Edit("number - 1", *match.span(), str(int(match[1]) - 1))


def synchronization(source: Source) -> Iterator[Edit]:
    """Leave out a barrier, a wait or a commit."""
    for start, end in source.statements():
        if _SYNC.match(source.code, start):
            yield Edit("drop synchronization", start, end, ";")


def statement(source: Source) -> Iterator[Edit]:
    """Leave out any other statement."""
    for start, end in source.statements():
        if not _SYNC.match(source.code, start):
            yield Edit("drop statement", start, end, ";")


def condition(source: Source) -> Iterator[Edit]:
    """Replace a condition by one that always or never holds."""
    for start, end in source.conditions():
        for value in ("true", "false"):
            yield Edit(f"condition {value}", start, end, value)


def swapped_arguments(source: Source) -> Iterator[Edit]:
    """Exchange two neighbouring arguments of a call."""
    for name, arguments in source.calls():
        for (start, end), (next_start, next_end) in itertools.pairwise(arguments):
            first, second = source.text[start:end], source.text[next_start:next_end]
            if name not in _COMMUTATIVE and first != second and first and second:
                between = source.text[end:next_start]
                yield Edit("swap arguments", start, next_end, second + between + first)


def swapped_operands(source: Source) -> Iterator[Edit]:
    """Turn a - b, a / b and a < b into b - a, b / a and b < a, where the operands are simple."""
    operand = r"[\w.]+(?:\[[\w.]+\]|\(\w*\))?"
    for match in re.finditer(rf"(?<![\w.*/%] )(?<![\w.])({operand}) ([-/]) ({operand})(?![\w.(\[])", source.code):
        yield Edit("swap operands", *match.span(), f"{match[3]} {match[2]} {match[1]}")


def ternary(source: Source) -> Iterator[Edit]:
    """Exchange the two choices of a conditional expression."""
    branch = r"[\w.\-]+(?:<[\w:]+>)?(?:\([\w.+\-*/ ,]*\))?(?:\[[\w.]+\])?"
    for match in re.finditer(rf"\? ({branch}) : ({branch})(?=[;),\s])", source.code):
        yield Edit("swap choices", *match.span(), f"? {match[2]} : {match[1]}")


def negation(source: Source) -> Iterator[Edit]:
    """Leave out a unary minus or a !."""
    for match in re.finditer(
        r"(?<=[(,=?:{] )-(?=[\w(])|(?<=[({])-(?=[A-Za-z_])|(?<=return )-(?=\w)|!(?=[\w(])", source.code
    ):
        yield Edit("drop negation", *match.span(), "")


def another_name(source: Source) -> Iterator[Edit]:
    """Replace a name by another one that it is easily taken for."""
    for pair in _NAMES:
        for old, new in (pair, pair[::-1]):
            word = rf"(?<![A-Za-z0-9])({old})\b" if old.endswith("_stride") else rf"\b({old})\b"
            for match in re.finditer(word, source.code):
                yield Edit("another name", match.start(1), match.end(1), new)


def increment(source: Source) -> Iterator[Edit]:
    """Let a loop begin one step late."""
    for match in re.finditer(r"\bfor \((?:const )?[\w ]+? \w+ = ([^;]+);", source.code):
        yield Edit("loop begins late", match.end(1), match.end(1), " + 1")


OPERATORS: tuple[Operator, ...] = (
    synchronization,
    comparison,
    bound,
    statement,
    arithmetic,
    number,
    condition,
    swapped_arguments,
    another_name,
    ternary,
    negation,
    swapped_operands,
    less,
    increment,
)


def edits(source: Source) -> Iterator[list[Edit]]:
    """The edits of each operator that has any, in the order of the text."""
    for operator in OPERATORS:
        found = sorted(dict.fromkeys(operator(source)), key=lambda edit: (edit.start, edit.end, edit.replacement))
        found = [edit for edit in found if edit.apply(source.text) != source.text]
        if found:
            yield found
