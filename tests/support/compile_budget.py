"""How many variants of kernels a session may ask for: the suite fails when it asks for more.

What is counted are the *distinct* cache keys of kernels (``/cuattn/kernels/*.cu``: those of the package, and edited
copies of them) that the session's processes asked `cuattn.compile` for, PTX and CUBIN apart. Whether a variant was in
the cache does not matter, so the figure is the same with a cold cache and a warm one: with a cold one, each is a
compilation. Sources that a test writes itself, and what it compiles in processes of its own, are not counted: they are
small. A variant counts once under pytest-xdist too, whichever of the processes asked for it.

The budget is that of the suite on the host: it is not held against free examples (a fuzzer's), the complete
``--all-resources``, or a machine with a GPU, where kernels are compiled for its architecture besides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest

from cuattn.compile import builder
from cuattn.compile.expand import VIRTUAL_ROOT

#: Distinct variants of a whole session, by kind: what the suite asks for, and a little room.
BUDGET = {"ptx": 1560, "cubin": 470}


class CompileBudget:
    """A plugin of pytest: counts in every process, adds up and judges in the one that controls the session."""

    def __init__(self, budget: Mapping[str, int] | None) -> None:
        """`budget` by kind; None counts and never fails."""
        self.budget = budget
        self.keys: dict[str, set[str]] = {kind: set() for kind in BUDGET}

    def watch(self, build_source: Callable[..., builder.Binary]) -> Callable[..., builder.Binary]:
        """`build_source`, counted."""

        @functools.wraps(build_source)
        def counted(text: str, *, name: str, **keywords: Any) -> builder.Binary:
            binary = build_source(text, name=name, **keywords)
            if name.startswith(VIRTUAL_ROOT):
                self.keys[binary.kind].add(binary.key)
            return binary

        return counted

    def add(self, counted: Mapping[str, Iterable[str]]) -> None:
        """Take over what another process has counted."""
        for kind, keys in counted.items():
            self.keys[kind] |= set(keys)

    def excess(self) -> str:
        """What is above the budget; empty when nothing is."""
        over = [
            f"{len(self.keys[kind])} {kind} variants, {most} are allowed"
            for kind, most in (self.budget or {}).items()
            if len(self.keys[kind]) > most
        ]
        return "; ".join(over)

    def pytest_sessionstart(self) -> None:
        builder.build_source = self.watch(builder.build_source)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.add(getattr(node, "workeroutput", {}).get("variants", {}))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        output = getattr(session.config, "workeroutput", None)
        if output is not None:  # a process of xdist: the controlling one adds up
            output["variants"] = {kind: sorted(keys) for kind, keys in self.keys.items()}
        elif self.excess() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        counts = ", ".join(f"{len(keys)} {kind}" for kind, keys in self.keys.items())
        terminalreporter.write_line(f"variants of kernels asked for: {counts}")
        if excess := self.excess():
            hint = "let tests share variants (cuattn.testing.pool), or raise BUDGET in tests/support/compile_budget.py"
            terminalreporter.write_line(f"FAILED budget of compilations: {excess}: {hint}", red=True)
