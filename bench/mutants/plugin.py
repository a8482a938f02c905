"""A pytest plugin with two uses: to note which tests run which kernel variants, and to run tests on mutated kernels.

What it is to do stands in the environment:

CUATTN_MUTANTS_NOTE      write here, a line a test, what it took and which kernel variants it built or launched
CUATTN_MUTANTS_SERVE     two file descriptors: read the names of plans from the first, a line each, run each plan in a
                         process of its own, and write a byte to the second when it is done. A plan is JSON: the
                         folder of the kernel sources, the tests to run in their order, the seconds after which a test
                         has hung or the whole run is over, and the variants to compile first: nothing runs if their
                         PTX is the original's

Seconds are those that the process computes: on a busy machine no test has hung because it has to wait.
"""

from __future__ import annotations

import faulthandler
import hashlib
import itertools
import json
import os
import re
import resource
import time
import traceback
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from cuattn import compile as kernel_compiler
from cuattn.compile import expand
from cuattn.errors import CompileError
from cuattn.runtime import executor as executors

EQUAL, REFUSED, DIFFERS = "the PTX is the same", "does not compile", "differs"
MAX_MESSAGE = 500
ASLEEP_FACTOR = 10.0  # a test that computes nothing for so many times as long has hung as well
_NOT_CODE = re.compile(rb"^(?:\t\.(?:loc|file)\b.*|\$L__tmp\d+:|//.*|\s*)\n", re.MULTILINE)


def variant_key(source: str, constants: Any, arch: str) -> str:
    """The key of a variant: one line of JSON, in which constants keep their types and their order."""
    return json.dumps([source, dict(constants), arch])


class Note:
    """Writes what each test that passed has used."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.used: dict[str, None] = {}
        self._watch()

    def _watch(self) -> None:
        build, load, start = kernel_compiler.build, executors.HostExecutor._load, executors.Executor.launch

        def noted_build(kernel: str, constants: Any, *, arch: str, kind: str, directory: Path | None = None) -> Any:
            if kind == "ptx" and directory is None:
                self.used[variant_key(kernel, constants, arch)] = None
            return build(kernel, constants, arch=arch, kind=kind, directory=directory)

        def noted_load(executor: executors.HostExecutor, source: str, constants: Any, entry: str) -> Any:
            kernel = load(executor, source, constants, entry)
            self.variants[id(kernel)] = variant_key(source, constants, executor.arch)
            return kernel

        def noted_launch(executor: executors.Executor, kernel: Any, *arguments: Any, **options: Any) -> None:
            if variant := self.variants.get(id(kernel)):
                self.used[variant] = None
            start(executor, kernel, *arguments, **options)

        self.variants: dict[int, str] = {}  # kernels live as long as their executor: for ever
        kernel_compiler.build = noted_build
        executors.HostExecutor._load = noted_load  # type: ignore[method-assign, assignment]
        executors.Executor.launch = noted_launch  # type: ignore[method-assign, assignment]

    def pytest_runtest_setup(self) -> None:
        self.used.clear()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            row = {"test": report.nodeid, "seconds": round(report.duration, 3), "variants": list(self.used)}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


class Serve:
    """Runs plan after plan on the tests that have been collected, each in a fork of this process."""

    def __init__(self, requests: int, answers: int) -> None:
        self.requests, self.answers = requests, answers

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        with os.fdopen(self.requests) as requests:
            for line in iter(requests.readline, ""):
                child = os.fork()
                if child == 0:
                    try:
                        plan = json.loads(Path(line.strip()).read_text(encoding="utf-8"))
                        run_plan(session, plan, [items[test] for test in plan["tests"]])
                    except BaseException:  # nothing may go on in the child as if it were the parent
                        traceback.print_exc()
                    finally:
                        os._exit(0)
                os.waitpid(child, 0)
                os.write(self.answers, b".")
        return True


def run_plan(session: pytest.Session, plan: dict[str, Any], items: list[pytest.Item]) -> None:
    """Run the planned tests until one fails, and write how each begins and ends."""
    expand.KERNELS = Path(plan["kernels"])
    run = Run(plan)
    session.config.pluginmanager.register(run)
    verdict = probe(plan["variants"])
    run.write(probe=verdict)
    if verdict != DIFFERS:
        return
    for item, following in itertools.zip_longest(items, items[1:]):
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail or session.shouldstop:
            return


class Run:
    """Writes how the tests of a plan begin and end."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.until = time.process_time() + plan["total_s"]

    def write(self, **row: Any) -> None:
        with open(self.plan["log"], "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        # A kernel that never ends may hold the interpreter: only the system or a thread of its own can end it then.
        hung_s, (limit, most) = self.plan["hung_s"][item.nodeid], resource.getrlimit(resource.RLIMIT_CPU)
        with open(os.devnull, "w") as nowhere:
            self.write(begin=item.nodeid)
            faulthandler.dump_traceback_later(ASLEEP_FACTOR * hung_s, exit=True, file=nowhere)
            resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + hung_s) + 1, most))
            yield
            resource.setrlimit(resource.RLIMIT_CPU, (limit, most))
            faulthandler.cancel_dump_traceback_later()
        if time.process_time() > self.until:
            item.session.shouldstop = "the time is up"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.write(failed=report.nodeid, message=report.longreprtext[-MAX_MESSAGE:])
        elif report.when == "call":
            self.write(passed=report.nodeid)


def probe(variants: list[list[str]]) -> str:
    """Whether any of the variants compiles to other PTX than the unchanged source, whose digest stands beside it."""
    for key, original in variants:
        source, constants, arch = json.loads(key)
        try:
            binary = kernel_compiler.build(source, constants, arch=arch, kind="ptx")
        except CompileError:
            return REFUSED
        if digest(binary.image) != original:
            return DIFFERS
    return EQUAL


def digest(ptx: bytes) -> str:
    """Digest of the instructions of a PTX text, without line tables and labels that belong to them."""
    code = _NOT_CODE.sub(b"", ptx.partition(b"\t.section\t.debug")[0])
    return hashlib.sha256(code).hexdigest()


def pytest_configure(config: pytest.Config) -> None:
    # A failing example is enough: that it could be smaller is of no interest here.
    quick = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    suite = hypothesis.settings.get_profile("suite")
    hypothesis.settings.register_profile("mutants", suite, phases=quick, database=None, report_multiple_bugs=False)
    hypothesis.settings.load_profile("mutants")
    if note := os.environ.get("CUATTN_MUTANTS_NOTE"):
        config.pluginmanager.register(Note(note))
    if serve := os.environ.get("CUATTN_MUTANTS_SERVE"):
        config.pluginmanager.register(Serve(*map(int, serve.split())))
