"""How another library spells the options of `cuattn.attention`: over the rows of the table of options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cuattn.compat.arguments import dropout_option, scale_option, softcap_option, window_option
from cuattn.errors import ArgumentError
from cuattn.ops.attention.options import OPTIONS

__all__ = ["DROPOUT", "LOGITS", "Spelling", "Spellings"]

_ROWS = {row.name: row for row in OPTIONS}


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True, slots=True)
class Spelling:
    """One option in another library.

    Attributes
    ----------
    option : str
        The name of its row in the table of options.
    theirs : tuple of str
        What the library calls it: one keyword, or those of the row that it has, the first ones.
    convert : callable
        From the values of those keywords to the value of ours; where the row has several, to a tuple of theirs.
    """

    option: str
    theirs: tuple[str, ...]
    convert: Callable[..., Any] = _same

    def __post_init__(self) -> None:
        if self.option not in _ROWS:
            raise ArgumentError(f"{self.option!r} is no row of the table of options")

    def converted(self, *values: Any) -> dict[str, Any]:
        """Return the keywords of `cuattn.attention` for values of theirs. Raises what ``convert`` does."""
        ours = tuple(_ROWS[self.option].keywords)
        result = self.convert(*values)
        return dict(zip(ours, result if len(ours) > 1 else (result,), strict=False))


class Spellings:
    """All options as one library has them.

    Parameters
    ----------
    *spellings : Spelling
    absent : mapping of str to str
        The rows that the library has no keyword for, and what stands there instead. Every row is in one of the two, so
        that a new option is decided on for each library.
    """

    def __init__(self, *spellings: Spelling, absent: Mapping[str, str]) -> None:
        self.of_option = {spelling.option: spelling for spelling in spellings}
        self.absent = dict(absent)
        self._of_keyword = {name: spelling for spelling in spellings for name in spelling.theirs}
        wrong = (_ROWS.keys() ^ {*self.of_option, *self.absent}) | (self.of_option.keys() & self.absent.keys())
        if wrong:
            raise ArgumentError(f"each row is either spelled or absent; these are not: {', '.join(sorted(wrong))}")

    def options(self, **theirs: Any) -> dict[str, Any]:
        """Return the options of `cuattn.attention` for keywords of the library; of one option all or none are given."""
        used = dict.fromkeys(self._of_keyword[name] for name in theirs)
        options: dict[str, Any] = {}
        for spelling in used:
            options |= spelling.converted(*[theirs[name] for name in spelling.theirs])
        return options

    @property
    def renamed(self) -> dict[str, str]:
        """Our keywords that have another name there, for messages: see `cuattn.runtime.renaming`."""
        return {
            option: spelling.theirs[0]
            for option, spelling in self.of_option.items()
            if len(spelling.theirs) == 1 and spelling.theirs[0] != option
        }


#: As every flash-attn has them.
LOGITS = (
    Spelling("scale", ("softmax_scale",), scale_option),
    Spelling("window", ("window_size",), window_option),
    Spelling("softcap", ("softcap",), softcap_option),
)
#: With the seed that only here has to be given.
DROPOUT = Spelling("dropout", ("dropout_p", "dropout_seed", "dropout_offset"), dropout_option)
