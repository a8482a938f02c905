"""One call of an operation, as plain data: what is drawn, shrunk, printed, saved and run again.

>>> case = Case("softmax", {"x": Array((2, 3), "float32"), "algorithm": "online"})
>>> Case.from_json(case.to_json()) == case
True
>>> print(case.snippet())
from cuattn.testing.fuzzing import Array, Case, run
<BLANKLINE>
case = Case(
    "softmax",
    {
        "x": Array((2, 3), "float32", "normal"),
        "algorithm": "online",
    },
)
run(case)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from cuattn.errors import ArgumentError
from cuattn.testing.fuzzing.arrays import Array, quoted

__all__ = ["Case"]


@dataclass(frozen=True)
class Case:
    """An operation and its arguments.

    Attributes
    ----------
    operation : str
        One of :data:`cuattn.testing.fuzzing.OPERATIONS`.
    arguments : dict
        By name: :class:`Array`, plain values, or tuples and dicts of those.
    """

    operation: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How much there is to look at: the elements of all arrays, and the arguments."""
        return sum(_elements(value) for value in self.arguments.values()) + len(self.arguments)

    def snippet(self) -> str:
        """Return a program that makes the call again."""
        lines = [f'        "{name}": {_literal(value)},' for name, value in self.arguments.items()]
        return "\n".join(
            [
                "from cuattn.testing.fuzzing import Array, Case, run",
                "",
                "case = Case(",
                f'    "{self.operation}",',
                "    {",
                *lines,
                "    },",
                ")",
                "run(case)",
            ]
        )

    def to_json(self) -> str:
        """Return the case as JSON."""
        arguments = {name: _encoded(value) for name, value in self.arguments.items()}
        return json.dumps({"operation": self.operation, "arguments": arguments}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Case:
        """Return the case that :meth:`to_json` wrote. Raises `ArgumentError` if it is none."""
        try:
            content = json.loads(text)
            arguments = {str(name): _decoded(value) for name, value in content["arguments"].items()}
            return Case(str(content["operation"]), arguments)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArgumentError(f"no case of the fuzzer: {type(error).__name__}: {error}") from error

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Hypothesis prints what it drew: as it can be run again."""
        printer.text(repr(self))


def _literal(value: Any) -> str:
    """Source text of a value that needs no names but `Array`: of named tuples, that of plain ones."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, dict):
        return f"{{{', '.join(f'{quoted(name)}: {_literal(one)}' for name, one in value.items())}}}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))}{',' * (len(value) == 1)})"
    return repr(value)


def _elements(value: Any) -> int:
    if isinstance(value, Array):
        count = 1
        for n in value.shape:
            count *= n
        return count + value.offset + sum(value.pad) + (value.order is not None)
    if isinstance(value, dict):
        return sum(map(_elements, value.values()))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return len(value) + sum(map(_elements, value))
    return 0


def _encoded(value: Any) -> Any:
    if isinstance(value, Array):
        default = {f.name: f.default for f in fields(value)}
        return {"array": {name: x for name, x in asdict(value).items() if x != default[name]}}
    if isinstance(value, dict):
        return {"dict": {name: _encoded(x) for name, x in value.items()}}
    if isinstance(value, tuple | list):
        return [_encoded(x) for x in value]
    return value


def _decoded(value: Any) -> Any:
    """Return what was encoded; a list stands for a tuple."""
    if isinstance(value, list):
        return tuple(map(_decoded, value))
    if isinstance(value, dict) and "array" in value:
        given: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in value["array"].items()}
        return Array(**given)
    if isinstance(value, dict):
        return {name: _decoded(x) for name, x in value["dict"].items()}
    return value
