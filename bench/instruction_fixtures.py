"""The instruction table on a device: its answers, kept, and where they differ from what the table expects.

The answers of a GPU are facts about it. ``instruction_answers.npz`` holds all of them, ``instruction_answers.json`` the
differences, in a form that can be committed as fixtures and compared with the host executor where there is no GPU.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from cuattn.benchmark.results import write_text
from cuattn.benchmark.suite import failure
from cuattn.testing import instructions

from .hopper_programs import run_programs

Answers = dict[str, np.ndarray[Any, Any]]
MAX_LISTED = 200  # differences of a family that are written out in words


class Runner:
    """Loads PTX and runs a case of the table, on the host executor or on a GPU."""

    def __init__(self, executor: str, scratch: Path) -> None:
        self.executor = executor
        self.scratch = scratch
        self.loaded = 0

    def load(self, text: str) -> Any:
        """A module of that PTX."""
        if self.executor == "host":
            from cuattn import host

            return host.RawModule(code=text)
        import cupy

        # A new name each time: CuPy keeps modules by their path.
        self.loaded += 1
        path = self.scratch / f"table_{self.loaded}.ptx"
        path.write_text(text, encoding="utf-8")
        module = cupy.RawModule(path=str(path))
        _ = module.get_function("case_0").num_regs  # loading happens on first use
        return module

    def run(self, module: Any, name: str, case: instructions.Case) -> np.ndarray[Any, Any]:
        """uint64 [destinations, threads]: what the case gave."""
        cells, threads = instructions.operands(case), instructions.num_threads(case)
        shape = (len(case.dsts), threads)
        if self.executor == "host":
            out = np.zeros(shape, np.uint64)
            module.get_function(name)((1,), (threads,), (cells, out, np.uint32(threads)))
            return out
        import cupy

        device_out = cupy.zeros(shape, np.uint64)
        module.get_function(name)((1,), (threads,), (cupy.asarray(cells), device_out, np.uint32(threads)))
        result: np.ndarray[Any, Any] = cupy.asnumpy(device_out)
        return result


Families = dict[str, dict[str, Any]]


def run_table(executor: str, out: Path, *, tiny: bool, until: float) -> tuple[Families, bool]:
    """Run every family for every architecture that this device has; return figures by family, and whether all ran.

    Both files are written after every family. Families that they have already are not run again.
    """
    answers_path, differences_path = out / "instruction_answers.npz", out / "instruction_answers.json"
    answers, result = _earlier(answers_path, differences_path)
    complete = True
    with tempfile.TemporaryDirectory(prefix="cuattn-") as scratch:
        runner = Runner(executor, Path(scratch))
        for key, work in _families(runner, tiny).items():
            if key in result:
                continue
            if time.monotonic() > until:
                complete = False
                continue
            result[key] = work(key, answers)
            _write_answers(answers_path, answers)
            write_text(differences_path, json.dumps(result, indent=1) + "\n")
    brief = {
        key: {**row, "differences": row["differences"][:3], "errors": row["errors"][:10]} for key, row in result.items()
    }
    for row in brief.values():
        del row["opcodes"]
    return brief, complete


def _families(runner: Runner, tiny: bool) -> dict[str, Callable[[str, Answers], dict[str, Any]]]:
    """The families to run and their architectures, the newest first: least is known of it."""
    found: dict[str, Callable[[str, Answers], dict[str, Any]]] = {}
    capability = _capability() if runner.executor == "cuda" else max(instructions.ARCHITECTURES)
    if capability == 90:
        found["hopper_sm_90a"] = partial(run_programs, runner.executor, runner.scratch)
    for arch in sorted(instructions.ARCHITECTURES, reverse=True):
        for name in instructions.FAMILIES:
            cases = instructions.cases_for(name, arch)[: 5 if tiny else None]
            if cases and arch <= capability:
                found[f"{name}_sm_{arch}"] = partial(_run_family, runner, cases, arch)
    return found


def _earlier(answers: Path, differences: Path) -> tuple[Answers, Families]:
    """What an earlier run has left; nothing if one of its files is missing or cannot be read."""
    try:
        with np.load(answers, allow_pickle=False) as file:
            return dict(file), json.loads(differences.read_text(encoding="utf-8"))
    except (OSError, ValueError, BadZipFile):
        return {}, {}


def _write_answers(path: Path, answers: Answers) -> None:
    """Write the answers to a file, whole or not at all."""
    fresh = path.with_suffix(".fresh.npz")
    np.savez_compressed(fresh, allow_pickle=False, **answers)
    os.replace(fresh, path)


def _run_family(
    runner: Runner, cases: tuple[instructions.Case, ...], arch: int, key: str, answers: Answers
) -> dict[str, Any]:
    differences: list[str] = []
    errors: list[str] = []
    different = 0
    try:
        module = runner.load(instructions.module_text(cases, arch))
        loaded = [(module, f"case_{number}") for number in range(len(cases))]
    except Exception:  # one instruction that the driver refuses takes the whole module with it: load each alone
        loaded = [(None, "case_0")] * len(cases)
    for number, (case, (module, name)) in enumerate(zip(cases, loaded, strict=True)):
        try:
            if module is None:
                module = runner.load(instructions.module_text([case], arch))
            answer = runner.run(module, name, case)
        except Exception as error:
            errors.append(f"{case.opcode}: {failure(error)}")
            continue
        answers[f"{key}_{number}"] = answer
        found = instructions.mismatches(case, answer)
        different += bool(found)
        differences += found[: 8 if len(differences) < MAX_LISTED else 0]
    opcodes = [case.opcode for case in cases]  # in the order of the numbers in the .npz file
    return {
        "cases": len(cases),
        "opcodes": opcodes,
        "different": different,
        "differences": differences,
        "refused": len(errors),
        "errors": errors,
    }


def _capability() -> int:
    import cupy

    return int(cupy.cuda.Device().compute_capability)
