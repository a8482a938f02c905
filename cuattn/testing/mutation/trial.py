"""Running a test command on mutants of a file, in a copy of the folder that it belongs to."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cuattn.errors import CuattnError

__all__ = ["Outcome", "Trial", "TrialError"]

_LEFT_OUT = shutil.ignore_patterns(".git", ".hg", ".venv", "venv", "node_modules", "__pycache__", "*.pyc", ".*_cache")
#: What is printed where a kernel does not compile: by NVRTC, nvcc, CuPy, Clang, and by this package.
_NOT_COMPILED = re.compile(
    r"CompileError|CompileException|NVRTC_ERROR_COMPILATION|\): (?:catastrophic )?error[ :]|: error: "
)
HUNG_LEAST_S, HUNG_FACTOR = 20.0, 10.0  # a run that takes so many times as long as the first has hung
_TAIL = 2000


class TrialError(CuattnError, RuntimeError):
    """Nothing can be learnt from mutants: the tests fail as they are, or do not use the file."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a text: "killed" (a test failed), "hung", "discarded" (it does not compile) or "survived"."""

    status: str
    seconds: float
    output: str  # the end of what the command printed


class Trial:
    """A command that is run on one text of a file after the other; a context manager.

    The folder is copied, without its history, environments and caches, and the command runs in the copy: the files
    themselves are never changed. ``PYTHONPATH`` then names the copy where it named the folder.
    """

    def __init__(self, root: Path, file: Path, command: Sequence[str], *, timeout_s: float | None = None) -> None:
        self.root, self.file = root.resolve(), file.resolve()
        if not self.file.is_relative_to(self.root):
            raise TrialError(f"{file} is not in the folder {root}, which is copied: name another one")
        self.command = list(command)
        self.timeout_s = timeout_s
        self.text = self.file.read_text(encoding="utf-8")

    def __enter__(self) -> Trial:
        self._folder = tempfile.TemporaryDirectory(prefix="cuattn-mutants-")
        self._copy = Path(self._folder.name).resolve() / self.root.name
        shutil.copytree(self.root, self._copy, symlinks=True, ignore=_LEFT_OUT)
        self._place = self._copy / self.file.relative_to(self.root)
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()

    def baseline(self) -> Outcome:
        """Run the command on the file as it is, and on one that does not compile.

        Raises
        ------
        TrialError
            The first fails, or the second does not: then the command does not look at the copy of the file.
        """
        first = self._run(self.text, self.timeout_s)
        if first.status != "survived":
            raise TrialError(f"the command fails on the file as it is:\n{first.output}")
        if self.timeout_s is None:
            self.timeout_s = max(HUNG_LEAST_S, HUNG_FACTOR * first.seconds)
        if self.run("#error this file is not to be compiled\n").status == "survived":
            raise TrialError(
                f"the command succeeds without {self.file.name}: it uses another copy of it, such as an installed one, "
                "or what was compiled before"
            )
        return first

    def run(self, text: str) -> Outcome:
        """Run the command with another text in the place of the file's."""
        return self._run(text, self.timeout_s)

    def _run(self, text: str, timeout_s: float | None) -> Outcome:
        self._place.write_text(text, encoding="utf-8")
        began = time.monotonic()
        paths = os.environ.get("PYTHONPATH", "").replace(str(self.root), str(self._copy))
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **({"PYTHONPATH": paths} if paths else {})}
        with tempfile.TemporaryFile() as file:
            try:
                process = subprocess.Popen(
                    self.command,
                    cwd=self._copy,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # all that the command starts is ended with it
                )
            except OSError as error:
                raise TrialError(f"{self.command[0]} cannot be run: {error.strerror}") from error
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            file.seek(0)
            output = file.read().decode(errors="replace")
        seconds = round(time.monotonic() - began, 2)
        if code is None:
            return Outcome("hung", seconds, output[-_TAIL:])
        status = "survived" if code == 0 else "discarded" if _NOT_COMPILED.search(output) else "killed"
        return Outcome(status, seconds, output[-_TAIL:])
