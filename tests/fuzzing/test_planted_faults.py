"""Faults that are planted in kernels are found: by results, by the checkers, in any order of warps."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: File, what stands in it, what is put there, and the skeleton of an operation that runs it.
FAULTS = {
    "softmax": (
        "softmax/softmax_state.cuh",
        "return row_max == -infinity() ? Accumulator(0) : row_max;",
        "return row_max;",
        {"dtype": "float32", "algorithm": "online", "options": []},
    ),
    "rope": (
        "rotary/rope.cuh",
        "y = fma(y, cos, x * sin);",
        "y = fma(y, cos, turned * sin);",
        {"dtype": "float32", "head_dim": 32, "options": []},
    ),
    "attention": (
        "common/ptx.cuh",
        '"n"(NUM_PENDING)',
        '"n"(NUM_PENDING + 1)',
        {"dtype": "float16", "head_dim": 32, "head_dim_v": 32, "aligned": True, "options": []},
    ),
}

PROGRAM = """
import json, sys
from pathlib import Path
from cuattn.compile import expand
expand.KERNELS = Path(sys.argv[1])
from cuattn.testing.fuzzing import OPERATIONS, Fuzzer
found = {}
for name, skeleton in json.loads(sys.argv[2]).items():
    one = OPERATIONS[name]
    failure = Fuzzer([one], seed=0, examples=60).attempts(one, skeleton, shrinking_s=2.0)
    found[name] = None if failure is None else [failure.error, failure.case.size]
print(json.dumps(found))
"""


def test_planted_faults_are_found(tmp_path: Path) -> None:
    kernels = tmp_path / "kernels"
    shutil.copytree(ROOT / "cuattn/kernels", kernels)
    for file, right, wrong, _ in FAULTS.values():
        text = (kernels / file).read_text(encoding="utf-8")
        assert text.count(right) == 1, file
        (kernels / file).write_text(text.replace(right, wrong), encoding="utf-8")
    skeletons = json.dumps({name: skeleton for name, (*_, skeleton) in FAULTS.items()})
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(kernels), skeletons], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(found.values()), found
