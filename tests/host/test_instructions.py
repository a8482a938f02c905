"""Every instruction of the table on the host executor: exact bits, or the bound of an approximate one."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest

import cuattn.host as host
from cuattn.errors import UnsupportedPTXError
from cuattn.host import library
from cuattn.host.lowering.op_classes import class_of
from cuattn.testing import instructions

GROUPS = [
    (name, arch)
    for name in instructions.FAMILIES
    for arch in instructions.ARCHITECTURES
    if instructions.cases_for(name, arch)
]


@lru_cache(maxsize=1)
def module(name, arch):
    return host.RawModule(code=instructions.module_text(instructions.cases_for(name, arch), arch))


@pytest.mark.parametrize(("name", "arch"), GROUPS)
def test_instructions_give_the_expected_bits(name, arch):
    problems = []
    for number, case in enumerate(instructions.cases_for(name, arch)):
        cells = instructions.operands(case)
        threads = instructions.num_threads(case)
        out = np.zeros((len(case.dsts), threads), np.uint64)
        kernel = module(name, arch).get_function(f"case_{number}")
        kernel((1,), (threads,), (cells, out, np.uint32(threads)))
        problems += instructions.mismatches(case, out)[:3]
    assert not problems, "\n".join(problems[:40])


def test_the_table_is_not_small():
    assert sum(len(instructions.family(name)) for name in instructions.FAMILIES) > 900


YOUNGER = [(name, arch) for name, arch in GROUPS if arch > 80]


@pytest.mark.parametrize(("name", "arch"), YOUNGER)
def test_an_instruction_that_the_target_does_not_have_is_refused(name, arch):
    older = max(a for a in instructions.ARCHITECTURES if a < arch)
    for case in instructions.cases_for(name, arch):
        text = instructions.module_text([case], arch).replace(f"sm_{arch}", f"sm_{older}")
        with pytest.raises(UnsupportedPTXError, match=f"needs sm_{arch}"):
            host.RawModule(code=text)


CLASSES = {
    "add_b32": "int", "prmt_5410": "int", "lop3_b32": "int", "fma_f32": "float", "f32_modified": "float",
    "mul_f64": "double", "f64_rounded": "double", "fma_bf16": "half", "max_f16": "half", "ex2_ftz_f32": "special",
    "cvt_rn_f16x2_f32": "convert", "convert": "convert", "ex2_f16": "special", "setp_lt_s32": "predicate",
    "selp_b64": "predicate", "mov_b64": "move", "unpack_2x16": "move", "ld": "memory",
}  # fmt: skip


@pytest.mark.parametrize("op", CLASSES)
def test_the_profile_counts_a_handler_under_its_class(op):
    assert op in library.op_index()
    assert class_of(op) == CLASSES[op]


UNKNOWN = [
    "add.rn.sat.f64 %d0, %d1, %d2;",
    "mad.wide.s64 %d0, %d1, %d2, %d0;",
    "add.relu.s32 %r0, %r1, %r2;",
    "fma.oob.rn.f32 %r0, %r1, %r2, %r0;",
    "ex2.f32 %r0, %r1;",
    "cvt.f16.f32 %h0, %r1;",
    "cvt.rn.f32.f16 %r0, %h1;",
    "cvt.rni.f32.f64 %r0, %d1;",
    "prmt.b32.f5e %r0, %r1, %r2, %r0;",
    "setp.lo.s32 %p0, %r1, %r2;",
    "setp.eq.s32 %p0, %r1;",
    "shf.l.b32 %r0, %r1, %r2, %r0;",
    "add.s32 %r0, %d1, %r2;",
    "add.s64 %d0, %r1, %d2;",
    "and.b32 %r0, %r1, %p0;",
    "min.abs.f32 %r0, %r1, %r2;",
]


@pytest.mark.parametrize("text", UNKNOWN)
def test_a_modifier_that_is_not_understood_is_refused(text):
    code = f"""
.version 8.1
.target sm_90
.address_size 64
.visible .entry k()
{{
.reg .pred %p<2>; .reg .b16 %h<4>; .reg .b32 %r<4>; .reg .b64 %d<4>;
{text}
ret;
}}
"""
    with pytest.raises(UnsupportedPTXError, match=text.split()[0]):
        host.RawModule(code=code).get_function("k")
