"""Processes that fuzz: what they did is added up; one that dies, or that does not end, is a failure."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import replace

from cuattn.testing.fuzzing.workers import Plan, fuzz

PLAN = Plan(("softmax",), seconds=60.0, workers=1, examples=4)


def test_a_process_that_dies_is_a_failure_and_is_replaced() -> None:
    killed, failure = [], None
    for progress in fuzz(PLAN):
        if progress.failure is not None:
            failure = progress.failure
        if progress.cases and not killed:
            killed = [process.pid for process in multiprocessing.active_children()]
            os.kill(killed[0], signal.SIGSEGV)
        if failure is not None and {process.pid for process in multiprocessing.active_children()} - {*killed}:
            break
    assert failure is not None and failure.error == "Crash: the process ended with SIGSEGV"
    assert failure.case.operation == "softmax" and "x" in failure.case.arguments
    assert multiprocessing.active_children() == []


def test_a_call_that_does_not_end_is_a_failure() -> None:
    found = []
    for progress in fuzz(replace(PLAN, patience_s=0.0)):
        found += [progress.failure] if progress.failure is not None else []
        if found:
            break
    assert found[0].error == "Hang: no end after 0 s" and found[0].case.operation == "softmax"
    assert multiprocessing.active_children() == []
