"""Some of the cases of a parametrized test of another project, drawn without listing them all."""

from __future__ import annotations

import random

import pytest


def draw(function, wanted, generator: random.Random):
    """One case: a value of each parameter, those that ``wanted`` (name to predicate) allows."""
    case = {}
    for mark in getattr(function, "pytestmark", ()):
        if mark.name != "parametrize":
            continue
        names, values = mark.args
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        rows = [value if len(names) > 1 else (value,) for value in values]
        rows = [
            row for row in rows if all(wanted.get(name, lambda _: True)(x) for name, x in zip(names, row, strict=True))
        ]
        assert rows, f"no value of {names} is wanted"
        case |= zip(names, generator.choice(rows), strict=True)
    return case


def run(function, count, wanted, seed=0, most_draws=50):
    """Call ``function`` with ``count`` drawn cases that it does not skip; how many of them there were."""
    generator, done = random.Random(f"{function.__name__} {seed}"), 0
    for _ in range(most_draws * count):
        if done == count:
            break
        case = draw(function, wanted, generator)
        try:
            function(**case)
        except pytest.skip.Exception:
            continue
        except Exception as error:
            error.add_note(f"in {function.__name__}({', '.join(f'{name}={x!r}' for name, x in case.items())})")
            raise
        done += 1
    return done
