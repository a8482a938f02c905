"""Run tests on a host executor that is built with AddressSanitizer and UndefinedBehaviorSanitizer.

``make sanitize``, or ``python -m bench.sanitize [pytest's arguments]``. Builds the C library into ``build/sanitize``,
runs the tests over it, and ends with status 1 if a test fails or a sanitizer reports anything. Leaks are not looked
for: the interpreter's own would hide them. Needs gcc.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cuattn import environment
from cuattn.host import build, library

FOLDER = Path("build", "sanitize")
FLAGS = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined")
#: The host executor's tests, the checkers among them, and the smoke tests of operations: each a run of pytest.
TESTS = (["tests/host"], ["tests/operations", "tests/kv", "-m", "smoke"])
_LIBRARY = "SANITIZED_LIBRARY"  # not with the prefix of cuattn's own variables, which are all known
_REPORTS = "report"


def pytest_configure() -> None:
    """Let this process, in which the file is a pytest plugin, use the library that the environment variable names."""
    library._loaded = library.Library(Path(os.environ[_LIBRARY]).read_bytes())


def runtime(command: tuple[str, ...]) -> str:
    """The sanitizer's runtime, which must be in the process before any other library."""
    argv = [*command, "-print-file-name=libasan.so"]
    found = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_absolute():
        raise SystemExit(f"{' '.join(command)} has no libasan.so: name gcc in CUATTN_CC")
    return found


#: A read behind an array, with the memory checker off: what the sanitizers are there to see.
PROBE = """
import numpy as np
from bench import sanitize
from cuattn import host
sanitize.pytest_configure()
kernel = host.RawModule('extern "C" __global__ void k(int* y, const int* x) { y[0] = x[y[0]]; }').get_function("k")
kernel((1,), (1,), (np.full(1, 64, np.int32), np.zeros(64, np.int32)))
"""


def reports() -> list[Path]:
    """What the sanitizers have written, a file a process."""
    return sorted(FOLDER.glob(f"{_REPORTS}.*"))


def forget_reports() -> None:
    """Remove what is there."""
    for report in reports():
        report.unlink()


def main(arguments: list[str]) -> int:
    """Build, run, report; returns the exit status."""
    command = build.find_compiler(environment.c_compiler())
    path = (FOLDER / build.library_name()).absolute()  # by the hash of its sources
    if not path.exists():
        print(f"building {path.name} with {' '.join(FLAGS)}", flush=True)
        build.build(FOLDER, command, FLAGS)
    common = f"log_path={(FOLDER / _REPORTS).absolute()}"
    variables = {
        _LIBRARY: str(path),
        "LD_PRELOAD": runtime(command),
        "ASAN_OPTIONS": f"detect_leaks=0:{common}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:{common}",
    }
    environ = {**os.environ, **variables}
    forget_reports()
    subprocess.run([sys.executable, "-c", PROBE], env=environ, capture_output=True, check=False)
    if not any("heap-buffer-overflow" in report.read_text(errors="replace") for report in reports()):
        print("the sanitizers do not see a read behind an array: their runtime does not work here")
        return 1
    forget_reports()
    argv = [sys.executable, "-m", "pytest", "-p", "bench.sanitize", "-p", "no:cacheprovider", *arguments]
    has_path = any(Path(x.split("::")[0]).exists() for x in arguments)
    runs = [argv] if has_path else [argv + tests for tests in TESTS]
    failed = [run for run in runs if subprocess.run(run, env=environ, check=False).returncode]
    found = reports()
    for report in found:
        print(report.read_text(errors="replace"))
    print(f"{len(found)} processes with reports of the sanitizers")
    return int(bool(failed or found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
