"""The instruction table on a device: its answers, kept, and where they differ from what the table expects.

The answers of a GPU are facts about it. ``instruction_answers.npz`` holds all of them, ``instruction_answers.json`` the
differences, in a form that can be committed as fixtures and compared with the host executor where there is no GPU.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from cuattn.benchmark.results import write_text
from cuattn.benchmark.suite import failure
from cuattn.testing import instructions

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


def run_table(executor: str, out: Path, *, tiny: bool, until: float) -> dict[str, dict[str, Any]]:
    """Run every family for every architecture that this device has; write both files; return figures by family."""
    scratch = tempfile.TemporaryDirectory(prefix="cuattn-")
    runner = Runner(executor, Path(scratch.name))
    answers: Answers = {}
    result: dict[str, dict[str, Any]] = {}
    for arch in instructions.ARCHITECTURES:
        if executor == "cuda" and arch > _capability():
            continue
        for name in instructions.FAMILIES:
            cases = instructions.cases_for(name, arch)[: 5 if tiny else None]
            if not cases or time.monotonic() > until:
                continue
            result[f"{name}_sm_{arch}"] = _run_family(runner, cases, arch, f"{name}_sm_{arch}", answers)
            write_text(out / "instruction_answers.json", json.dumps(result, indent=1) + "\n")
    scratch.cleanup()
    np.savez_compressed(out / "instruction_answers.npz", allow_pickle=False, **answers)
    for row in result.values():
        del row["opcodes"], row["differences"][3:], row["errors"][10:]
    return result


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
