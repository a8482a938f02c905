"""A pytest process that has collected its tests, and runs them on one mutant after the other: see `plugin.Serve`."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from bench.mutants.tests_of import ROOT

COMMAND = (sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "bench.mutants.plugin")


class Server:
    """Starts such a process, and tells it what to do."""

    def __init__(self, files: Sequence[str], environment: Mapping[str, str], output: Path) -> None:
        requests, self.requests = os.pipe()
        self.answers, answers = os.pipe()
        self.output = output
        with open(output, "wb") as log:
            self.process = subprocess.Popen(
                [*COMMAND, *files],
                cwd=ROOT,
                env={**environment, "CUATTN_MUTANTS_SERVE": f"{requests} {answers}"},
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                pass_fds=(requests, answers),
                start_new_session=True,
            )
        os.close(requests)
        os.close(answers)

    def run(self, plan: Path, limit_s: float) -> bool:
        """Run a plan; False if it took too long, after which the server is closed."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self.requests, f"{plan}\n".encode())
        ready, *_ = select.select([self.answers], [], [], limit_s)
        if not ready:
            self.close()
            return False
        if not os.read(self.answers, 1):
            self.close()
            raise click.ClickException(f"the tests do not run: see {self.output}")
        return True

    def close(self) -> None:
        """End the process, with the compilers that it has started."""
        os.close(self.requests)
        os.close(self.answers)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
