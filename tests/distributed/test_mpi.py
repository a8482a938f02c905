"""Ranks that are processes: `mpiexec -n 4`, with the MPI that is installed beside this Python."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).resolve().parents[1] / "support"
ROOT = SUPPORT.parents[1]
BESIDE = Path(sys.executable).parent / "mpiexec"
MPIEXEC = str(BESIDE) if BESIDE.exists() else shutil.which("mpiexec")
RANKS = 4

pytestmark = pytest.mark.skipif(
    MPIEXEC is None or importlib.util.find_spec("mpi4py") is None, reason="no mpiexec or no mpi4py: cuattn[test]"
)


def run(case, *, behind="", timeout=120):
    """The lines of the ranks that came through, in the order of ranks. `behind`: what a shell does after each."""
    paths = os.pathsep.join([str(ROOT), str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "CUATTN_HOST_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    flags = ["--allow-run-as-root", "--oversubscribe"] if _is_open_mpi() else []
    program = [sys.executable, str(SUPPORT / "mpi_program.py"), case]
    if behind:
        program = ["sh", "-c", f"{shlex.join(program)}; {behind}"]
    command = [str(MPIEXEC), *flags, "-n", str(RANKS), *program]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    return sorted(lines, key=lambda line: line["rank"]), process


def _is_open_mpi():
    version = subprocess.run([str(MPIEXEC), "--version"], capture_output=True, text=True, check=False)
    return "Open MPI" in version.stdout or "OpenRTE" in version.stdout


def test_results_and_errors():
    lines, process = run("together")
    told = {what: [line for line in lines if line["what"] == what] for what in ("results", "mismatch", "raises")}
    for of_ranks in told.values():
        assert [line["rank"] for line in of_ranks] == list(range(RANKS)), process.stderr
    check_results(told["results"])
    for line in told["mismatch"]:
        assert "ranks differ in softcap" in line["error"]
        assert line["bytes"] == 0
        assert line["shape"] == [2, 4, 4, 32]
    assert [line["error"] for line in told["raises"]] == ["PeerError", "PeerError", "ZeroDivisionError", "PeerError"]
    assert all("of rank 2" in line["text"] for line in told["raises"])
    assert all(line["seconds"] < 10 for line in told["raises"])


def check_results(lines):
    for rank, line in enumerate(lines):
        assert line["received"] == [(rank - 1) % RANKS] * 3
        assert line["exchanged"] == [[10 * rank + other] * (other + 1) for other in range(RANKS)]
        assert line["gathered"] == list(range(RANKS))
        assert (line["sum"], line["max"]) == ([6.0, 4.0], [3, 0])
        assert line["half"] == [1 - rank // 2, 2, [2 if rank % 2 == 0 else 4]]
        assert max(line["errors"]) < 1e-5
        assert line["bits"] == [True, True]
    # in a ring every share is sent three times: by all but the rank before its owner
    share = [line["tokens"] * 2 * 2 * 64 * 4 for line in lines]
    sent = [sum(share) - share[(rank + 1) % RANKS] for rank in range(RANKS)]
    assert [line["bytes"][0] for line in lines] == sent


def test_a_rank_that_is_killed():
    """The launcher would end the other ranks itself, if it knew: the shell that it has started lives on."""
    lines, process = run("killed", behind="sleep 3")
    assert [line["rank"] for line in lines] == [0, 2, 3], process.stderr
    assert all(line["error"] in ("GroupTimeoutError", "PeerError") for line in lines)
    assert all(line["seconds"] < 30 for line in lines)
