"""What a run of the command line has to look like."""

from __future__ import annotations

from click.testing import Result

__all__ = ["is_one_line_error"]


def is_one_line_error(result: Result, code: int = 1) -> bool:
    lines = result.stderr.strip().splitlines()
    return result.exit_code == code and len(lines) == 1 and lines[0].startswith("Error: ")
