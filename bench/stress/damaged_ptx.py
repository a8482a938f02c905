"""Read PTX that was damaged at random, and run what can still be read.

``python -m bench.stress.damaged_ptx --count 2000``. The texts are what NVRTC makes of a kernel written for this, which
has something of everything, and of kernels of the package. Every damaged text must give tables or
`UnsupportedPTXError`, within bounded time and memory; the kernel that was written for this is then launched with every
checker on, where it may end in any error of the package, and is interrupted if it does not end. Works in processes of
its own, so that a crash is seen.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from cuattn import compile, errors, host
from cuattn.benchmark import variants
from cuattn.compile import build_source
from cuattn.host import module
from cuattn.host.kernel import RawKernel

from .timers import raise_after

PER_PROCESS = 250
MAX_SECONDS = 10.0  # to read a text; the texts as they are take 0.1 s at most
MAX_GROWTH_KB = 1 << 20
RUN_SECONDS = 0.5

SOURCE = r"""
__device__ int visits = 3;
__constant__ float factors[4] = {1.f, 2.f, -3.f, 4.f};
extern "C" __global__ void __launch_bounds__(64) k(float* y, const float* x, int n, double a, short2 pair) {
  __shared__ float tile[64];
  extern __shared__ float more[];
  float local[8];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  for (int j = 0; j < 8; j++) local[(j * n) & 7] = x[(i + j) % n] * factors[j & 3];
  tile[threadIdx.x] = more[threadIdx.x] = local[i & 7];
  __syncthreads();
  float sum = tile[63 - threadIdx.x] + more[0];
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  switch (i & 7) {
    case 0: sum += 1; break;
    case 1: sum *= pair.x; break;
    case 2: sum = exp2f(sum); break;
    case 3: sum -= pair.y; break;
    case 4: sum = (float)(a * sum); break;
    case 5: sum = sqrtf(fabsf(sum)); break;
    case 6: sum = fmaf(sum, sum, n); break;
  }
  asm volatile("{ .reg .pred p; .reg .b32 %twice; setp.gt.s32 p, %1, 5; add.s32 %twice, %1, %1;\n"
               "@p st.global.f32 [%0], %2; }" :: "l"(y + i), "r"(n), "f"(sum));
  if (i == 0) atomicAdd(&visits, 1);
}
"""
SUFFIXES = (
    "b8",
    "u8",
    "b16",
    "u32",
    "s32",
    "f32",
    "b64",
    "u64",
    "f64",
    "pred",
    "v2",
    "v4",
    "global",
    "shared",
    "param",
)
NUMBERS = ("0", "-1", "1", "255", "65536", "2147483647", "4294967295", "4294967296", "99999999999999999999", "9" * 5000)
_NUMBER = re.compile(r"\d+")
_WORD = re.compile(r"[%$\w]+")
_SUFFIX = re.compile(r"\.\w+")


def texts() -> list[str]:
    """The texts that are damaged: the kernel above first."""
    sources = [build_source(SOURCE, name="damaged", arch="sm_80", kind="ptx").image.decode()]
    for variant in list(variants.softmax_variants())[:40:20]:
        sources.append(compile.build(variant.kernel, variant.constants, arch="sm_80", kind="ptx").image.decode())
    return sources


def _replace(rng: random.Random, text: str, pattern: re.Pattern[str], choices: Callable[[], str]) -> str:
    found = list(pattern.finditer(text))
    if not found:  # little is left of it
        return text
    match = rng.choice(found)
    return text[: match.start()] + choices() + text[match.end() :]


def damage(text: str, rng: random.Random) -> str:
    """Make one to three random changes to a text."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.randrange(9)
        a, b = sorted((rng.randrange(len(text)), rng.randrange(len(text))))
        b = min(b, a + rng.choice((1, 3, 20, 200)))
        lines = text.split("\n")
        i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
        if kind == 0:
            text = text[:a] + text[b:]
        elif kind == 1:
            text = text[:a] + text[a:b] * rng.choice((2, 3, 50)) + text[b:]
        elif kind == 2:
            text = text[:a]
        elif kind == 3:
            text = text[:a] + "".join(rng.choice('{}[]();,.:@!%|_+-<>=/*"\\ \n\t09azé') for _ in range(4)) + text[b:]
        elif kind == 4:
            del lines[i]
            text = "\n".join(lines)
        elif kind == 5:
            lines[i], lines[j] = lines[j], lines[i]
            text = "\n".join(lines)
        elif kind == 6:
            text = _replace(rng, text, _NUMBER, lambda: rng.choice(NUMBERS))
        elif kind == 7:
            words = _WORD.findall(text)
            text = _replace(rng, text, _WORD, lambda words=words: rng.choice(words))  # type: ignore[misc]
        else:
            text = _replace(rng, text, _SUFFIX, lambda: "." + rng.choice(SUFFIXES))
        if len(text) < 20:
            break
    return text


class _TooLong(Exception):
    """A launch took too long and was stopped."""


def _launch(kernel: RawKernel) -> None:
    """Launch with the arguments of the kernel as it was written, whatever has become of it."""
    x, y = np.arange(256, dtype=np.float32), np.zeros(256, np.float32)
    args = (y, x, np.int32(200), np.float64(2), np.void(b"\3\0\4\0"))
    with host.check("all"), host.schedule("eager", threads=1), raise_after(RUN_SECONDS, _TooLong):
        kernel((2,), (64,), args, shared_mem=256)


def read(text: str, can_run: bool) -> str:
    """Read one text, and run it; returns what is wrong, or nothing."""
    start = time.perf_counter()
    try:
        module.build_tables(text)
    except errors.UnsupportedPTXError:
        return ""
    except Exception as error:
        return f"{type(error).__name__} while reading: {error!s:.200}"
    finally:
        took = time.perf_counter() - start
    if took > MAX_SECONDS:
        return f"{took:.0f} s to read it"
    if can_run:
        try:
            _launch(host.RawModule(text).get_function("k"))
        except (errors.CuattnError, _TooLong):
            pass
        except Exception as error:
            return f"{type(error).__name__} while running: {error!s:.200}"
    return ""


def child(count: int, seed: int) -> list[str]:
    """Read and run ``count`` damaged texts in this process; returns what went wrong with them."""
    sources = texts()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    faults = []
    for number in range(seed, seed + count):
        rng = random.Random(number)
        which = rng.choice((0, 0, *range(len(sources))))
        print(number, file=sys.stderr, flush=True)  # which one it was, after a crash
        fault = read(damage(sources[which], rng), which == 0)
        if fault:
            faults.append(f"seed {number}: {fault}")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown
    if grown > MAX_GROWTH_KB:
        faults.append(f"seeds from {seed}: {grown >> 10} MiB more memory")
    return faults


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="damaged texts in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        print(json.dumps(child(options.count, options.seed)))
        return 0
    faults: list[str] = []
    for seed in range(options.seed, options.seed + options.count, PER_PROCESS):
        count = min(PER_PROCESS, options.seed + options.count - seed)
        command = [sys.executable, "-m", "bench.stress.damaged_ptx", "--child", f"--count={count}", f"--seed={seed}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60 + 5 * count, check=False)
        except subprocess.TimeoutExpired as error:
            faults.append(f"hangs after seed {(error.stderr or b'?').split()[-1]!r}")
            continue
        if done.returncode:
            faults.append(f"ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        else:
            faults += json.loads(done.stdout)
    for fault in faults:
        print(fault)
    print(f"{options.count} damaged texts: {len(faults)} faults")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
