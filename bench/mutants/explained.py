"""Survivors that are no fault of the tests: file, a pattern for "before => after", and the reason."""

EXPLAINED: tuple[tuple[str, str, str], ...] = ()
