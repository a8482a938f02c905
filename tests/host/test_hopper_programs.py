"""The Hopper programs of the instruction table, on the host executor, with every checker and schedule."""

from __future__ import annotations

import numpy as np
import pytest

from bench.hopper_programs import run_on_host
from cuattn import compile, host
from cuattn.compile import ptxas_notes
from cuattn.testing.instructions import hopper_programs

PROGRAMS = hopper_programs.programs()


@pytest.fixture(scope="module")
def module():
    return host.RawModule(code=hopper_programs.source(), arch=hopper_programs.ARCH)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_a_program_gives_the_expected_words(module, program):
    for mode in ("eager", "late", "random"):
        with host.check("mem", "init", "race"), host.schedule(mode, 1):
            answer = run_on_host(module, program)
        assert program.mismatches(answer) == []


def test_ptxas_takes_them_all():
    """What the host executor runs must exist."""
    source = hopper_programs.source()
    binary = compile.build_source(source, name="hopper_programs.cu", arch=hopper_programs.ARCH, kind="cubin")
    assert set(binary.resources) == {program.entry for program in PROGRAMS}
    assert ptxas_notes.notes(binary.log) == ()


def test_a_wrong_word_is_named():
    program = PROGRAMS[0]
    answer = program.expected.copy()
    answer[3] ^= np.uint32(1)
    assert program.mismatches(answer) == ["mbarrier word 3: 0x0, expected 0x1"]
