"""Plant a fault in the kernels, and see whether the fuzzer finds it.

``python -m bench.stress.planted_faults --sample 20 --seconds 60``. The faults are those that the mutants write by hand
(`bench.mutants.semantic`), apart from those of the Hopper kernel, one at a time, each in a process of its own that
takes its kernels from a copy of the folder. The operations that run a changed file are fuzzed until one call is wrong,
or the time is over. Some faults change nothing that can be seen: docs/mutants.md explains them.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

from bench.mutants.semantic import Semantic, table
from cuattn.testing.mutation.source import Source

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "cuattn/kernels"
GRACE_S = 300  # beyond the time of a fault: compiling for its last round, and shrinking

#: The kernel files that calls of an operation launch, by the beginnings of their names.
LAUNCHED = {
    "attention": ("attention_forward.cu", "attention_forward_fma.cu", "attention_mask_tiles.cu"),
    "attention_varlen": ("attention_schedule.cu",),
    "standard_attention": ("attention_standard.cu",),
    "attention_backward": ("attention_backward",),
    "decode_attention": ("attention_decode",),
    "append_kv": ("append_kv.cu",),
    "linear_attention": ("linear_attention.cu", "linear_attention_fma.cu", "linear_attention_scan.cu"),
    "linear_attention_backward": ("linear_attention_backward.cu",),
    "differential_attention": ("differential_attention",),
    "differential_attention_backward": ("differential_backward",),
    "dual_chunk_attention": ("dual_chunk_attention",),
    "softmax": ("softmax.cu", "softmax_onchip.cu", "softmax_split.cu"),
    "rope": ("rope.cu",),
    "split_qkv": ("split_qkv.cu",),
    "merge_states": ("merge_states.cu",),
    "padding": ("padding_",),
}

PROGRAM = """
import json, sys, time
from pathlib import Path
from cuattn.compile import expand
expand.KERNELS = Path(sys.argv[1])
from cuattn.testing.fuzzing import Fuzzer, How
from cuattn.testing.fuzzing.catalogue import choose
from cuattn.testing.fuzzing import engine
engine.SHRINKING_S = 5.0
began, until = time.monotonic(), time.monotonic() + float(sys.argv[3])
fuzzer, failure = Fuzzer(choose(json.loads(sys.argv[2])), seed=sys.argv[4], how=How(schedules=1), examples=30), None
while failure is None and time.monotonic() < until:
    failure = fuzzer.round(until)
calls = sum(fuzzer.coverage.cases.values())
print(json.dumps({"error": failure and failure.error, "calls": calls, "seconds": round(time.monotonic() - began)}))
"""


@cache
def included(file: str) -> frozenset[str]:
    """The headers that a kernel file includes, and those that they do."""
    found: set[str] = set()
    for name in re.findall(r'^#include "([^"]+)"', (KERNELS / file).read_text(encoding="utf-8"), re.MULTILINE):
        if name not in found and (KERNELS / name).exists():
            found |= {name, *included(name)}
    return frozenset(found)


def operations(file: str) -> list[str]:
    """The operations that a change of a file may change."""
    kernels = [path.name for path in sorted(KERNELS.glob("*.cu")) if path.name == file or file in included(path.name)]
    return [name for name, begin in LAUNCHED.items() if any(kernel.startswith(begin) for kernel in kernels)]


def faults() -> list[Semantic]:
    """Return the faults that can still be planted and that an operation of the fuzzer runs."""
    found = []
    for fault in table():
        path = KERNELS / fault.file
        if not path.exists() or not operations(fault.file):
            continue
        if fault.find(Source.of(fault.file, path.read_text(encoding="utf-8"))) is not None:
            found.append(fault)
    return found


def tried(fault: Semantic, seconds: float, seed: int) -> dict[str, object]:
    """What came of fuzzing with a fault: the error, or None; calls and seconds."""
    text = (KERNELS / fault.file).read_text(encoding="utf-8")
    edit = fault.find(Source.of(fault.file, text))
    assert edit is not None
    with tempfile.TemporaryDirectory(prefix="cuattn-planted-") as name:
        kernels = Path(name) / "kernels"
        shutil.copytree(KERNELS, kernels)
        changed = text[: edit.start] + edit.replacement + text[edit.end :]
        (kernels / fault.file).write_text(changed, encoding="utf-8")
        arguments = str(kernels), json.dumps(operations(fault.file)), str(seconds), str(seed)
        command, until = [sys.executable, "-c", PROGRAM, *arguments], seconds + GRACE_S
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=until, check=False)
        except subprocess.TimeoutExpired:
            return {"error": "Hang", "calls": 0, "seconds": seconds + GRACE_S}
    if done.returncode:
        last = (done.stderr.strip() or str(done.returncode)).splitlines()[-1]
        return {"error": f"Crash: {last}", "calls": 0, "seconds": 0}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Plant faults and print what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sample", type=int, default=20, help="so many faults, drawn from all (0: all)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of fuzzing, for each")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chosen = faults()
    if 0 < arguments.sample < len(chosen):
        chosen = random.Random(arguments.seed).sample(chosen, arguments.sample)
    missed, began = 0, time.monotonic()
    for fault in chosen:
        found = tried(fault, arguments.seconds, arguments.seed)
        missed += found["error"] is None
        told = str(found["error"] or "NOT FOUND")[:110]
        print(f"{fault.file}: {fault.what}: {found['calls']} calls, {found['seconds']} s: {told}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} found in {time.monotonic() - began:.0f} s")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
