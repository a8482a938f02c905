"""A kernel source as text to edit: what is code in it, and where its statements are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# Blanked by spaces of the same length, so that positions stay what they are. Not code: comments, strings,
# preprocessor lines. Code that says how fast and never what: launch bounds, alignment. Code that only refuses.
_NOT_MUTATED = re.compile(
    r"""//[^\n]* | /\*.*?\*/ | "(?:\\.|[^"\\\n])*" | ^[ \t]*\#[^\n]* | \bstatic_assert\s*\(.*?\)\s*;
      | __launch_bounds__\([^\n]*\) | \b(?:alignas|__align__)\([^\n]*?\)(?=\s\w)""",
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)
_NOT_A_STATEMENT = re.compile(
    r"(?:const|constexpr|using|struct|union|template|typename|return|extern|static|static_assert|case|default|public|"
    r"__shared__|__device__|__align__)\b"
)
_EXPRESSION = re.compile(
    r"""(?: [*\w.\[\]()>:\s+\-]*? [\w\])] \s* (?:[-+*/%&|^]|<<|>>)? = (?!=)   # an assignment to no new variable
          | [\w:.]+ (?:<[^;=]*>)? \( .* \) $                                  # a call
          | (?:continue|break) $
        )""",
    re.VERBOSE | re.DOTALL,
)
_DECLARATION = re.compile(r"(?:[A-Za-z_][\w:]*(?:<[^;=]*>)?[\s*&]+)+[A-Za-z_]\w*(?:\[[^;=]*\])?\s*(?:[=;({]|$)")
_HEADER = re.compile(r"\s*(?:else\s+)?(?:if\s+constexpr|if|for|while|else)\b\s*")


@dataclass(frozen=True)
class Source:
    """``text`` of a kernel file, and ``code``: the same with everything blanked that no mutant changes."""

    name: str
    text: str
    code: str

    @classmethod
    def of(cls, name: str, text: str) -> Source:
        return cls(name, text, _NOT_MUTATED.sub(_blank, text))

    def line_of(self, position: int) -> int:
        """Number of the line at a position, from 1."""
        return self.text.count("\n", 0, position) + 1

    def line_text(self, line: int) -> str:
        return self.text.splitlines()[line - 1].strip()

    def statements(self) -> Iterator[tuple[int, int]]:
        """[start, end) of every expression statement, its semicolon included, ``if`` and ``for`` before it not."""
        depth, start = 0, 0
        for position, char in enumerate(self.code):
            if char in "([":
                depth += 1
            elif char in ")]":
                depth -= 1
            elif depth == 0 and char in ";{}":
                if char == ";":
                    begin = self._skip_headers(start, position)
                    body = self.code[begin:position].strip()
                    if _is_expression(body):
                        yield (
                            begin + len(self.code[begin:position]) - len(self.code[begin:position].lstrip()),
                            position + 1,
                        )
                start = position + 1

    def _skip_headers(self, start: int, end: int) -> int:
        while match := _HEADER.match(self.code, start, end):
            start = match.end()
            if start < end and self.code[start] == "(":
                start = self.closing(start) + 1
        return start

    def closing(self, opening: int) -> int:
        """Position of the parenthesis that closes the one at ``opening``."""
        depth = 0
        for position in range(opening, len(self.code)):
            depth += (self.code[position] == "(") - (self.code[position] == ")")
            if depth == 0:
                return position
        return len(self.code) - 1

    def conditions(self) -> Iterator[tuple[int, int]]:
        """[start, end) of what stands between the parentheses of every ``if``."""
        for match in re.finditer(r"\bif(?:\s+constexpr)?\s*\(", self.code):
            yield match.end(), self.closing(match.end() - 1)

    def calls(self) -> Iterator[tuple[str, list[tuple[int, int]]]]:
        """Name, and [start, end) of each argument, of everything that looks like a call and defines nothing."""
        for match in re.finditer(r"\b([A-Za-z_][\w:]*)(?:<[\w:, +\-*/<>]*>)?\(", self.code):
            if match[1] in ("if", "for", "while", "switch", "sizeof", "alignas", "decltype"):
                continue
            opening = match.end() - 1
            closing = self.closing(opening)
            if self.code[closing + 1 :].lstrip()[:1] in ("{", "") or self.code[closing + 1 :].lstrip().startswith(
                "const"
            ):
                continue
            yield match[1], list(self._split(opening + 1, closing))

    def _split(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        depth, begin = 0, start
        for position in range(start, end):
            char = self.code[position]
            depth += (char in "([{") - (char in ")]}")
            if depth == 0 and char == ",":
                yield self._stripped(begin, position)
                begin = position + 1
        yield self._stripped(begin, end)

    def _stripped(self, start: int, end: int) -> tuple[int, int]:
        text = self.code[start:end]
        return start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())


def _is_expression(text: str) -> bool:
    if not text or _NOT_A_STATEMENT.match(text) or _DECLARATION.match(text):
        return False
    return bool(_EXPRESSION.match(text)) or text.startswith(("++", "--")) or text.endswith(("++", "--"))


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])
