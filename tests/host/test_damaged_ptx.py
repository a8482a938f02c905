"""PTX that is malformed, absurd or hostile: a typed error, soon, whatever it is."""

from __future__ import annotations

import time

import numpy as np
import pytest

import cuattn.host as host
from bench.stress import damaged_ptx
from cuattn import errors
from cuattn.host.module import build_tables

HEAD = ".version 7.8\n.target sm_80\n.address_size 64\n"


def refused(text, match=None):
    """How long it takes to refuse a text, in seconds of this thread."""
    start = time.thread_time()
    with pytest.raises(errors.UnsupportedPTXError, match=match):
        build_tables(text)
    return time.thread_time() - start


def kernel(body, params=".param .u64 out", directives=""):
    return f"{HEAD}.visible .entry k({params}){directives} {{\n{body}\nret;\n}}\n"


def test_many_registers_cost_nothing_until_they_are_used():
    start = time.thread_time()
    build_tables(kernel(".reg .b32 %r<999999999>; mov.b32 %r999999998, 1;"))
    assert time.thread_time() - start < 1
    refused(kernel(".reg .b32 %r<9>; mov.b32 %r9, 1;"), "%r9")
    refused(kernel(".reg .b32 %r<9>; mov.b32 %r01, 1;"), "%r01")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (kernel(".reg .b32 %r<99999999999999>;"), "cannot read the register"),
        (kernel(".reg .b33 %r<9>;"), r"registers of type \.b33"),
        (kernel(".reg .b32 %r<9>; add.s32 %r1, %r2, " + "9" * 5000 + ";"), "add.s32"),
        (kernel(".reg .b64 %r<9>; ld.global.u64 %r1, [%r2+99999999999];"), "does not fit 32 bits"),
        (kernel(".reg .b64 %r<9>; ld.param.u64 %r1, [out+8];"), "beyond the 8 bytes of parameters"),
        (kernel(".reg .b64 %r<9>; ld.param.u64 %r1, [out+-8];"), "beyond the 8 bytes of parameters"),
        (kernel(".reg .b32 %r<9>; mov.b32 %r1|%r1|%r1, %r2;"), "cannot read the operand"),
        (kernel("L: L: "), "label L stands twice"),
        (kernel("bra L;"), "unknown label"),
        (kernel(".reg .b32 %r<9>; .reg .pred %p; setp.eq.s4294967296 %p, %r1, 3;"), "s4294967296"),
        (kernel(".reg .b32 %r<9>; add.s4294967296 %r1, %r1, 3;"), "s4294967296"),
        (kernel(".reg .b32 %r<9>; cvt.s99999999999.u8 %r1, %r1;"), "s99999999999"),
        (kernel("{" * 100 + "}" * 100), "more than 64 braces"),
        (kernel(".local .b8 x[99999999999];"), "larger than"),
        (kernel(".shared .b8 x[9999][9999];"), "larger than"),
        (kernel(".shared .align 3 .b8 x[4];"), "alignment 3"),
        (kernel(".shared .align 0 .b8 x[4];"), "alignment 0"),
        (kernel("", ".param .b8 x[40000]"), "40000 bytes"),
        (kernel("", ".param .b8 x[0]"), "0 bytes"),
        (kernel("", ".param .align 5 .b8 x[5]"), "alignment 5"),
        (kernel("", ".param .u65 x"), "cannot read the parameter"),
        (kernel("", ".param .u64"), "cannot read the parameter"),
        (kernel("", directives=".maxntid 0, 1, 1"), "maxntid 0"),
        (kernel("", directives=".maxntid 1, 1, 1, 1"), "maxntid"),
        (kernel("", directives=".reqnctapercluster 0"), "reqnctapercluster 0"),
        (kernel("", directives=".maxnreg " + "9" * 5000), "maxnreg"),
        (kernel("", directives=".maxnreg"), "malformed PTX"),
        (HEAD + ".global .u33 x;" + kernel("")[len(HEAD) :], r"variable x has type \.u33"),
        (HEAD + ".global .b8 x[2] = {1, 2, 3};" + kernel("")[len(HEAD) :], "initial value of 3"),
        (HEAD + ".global .f32 x = 0d3FF0000000000000;" + kernel("")[len(HEAD) :], "initial value"),
        (HEAD + ".visible .entry k(.param .u64 a", "the text ends before the body"),
        (HEAD + ".visible .entry k() { ret;", "the text ends inside the body"),
        (HEAD + ".visible .entry k() { ret", "the text ends inside the body"),
        (kernel("") + kernel("")[len(HEAD) :], "defined twice"),
        (".version 7.8\n.target sm_x\n", "does not begin with"),
        (".version seven\n.target sm_80\n", "does not begin with"),
    ],
)
def test_what_ptx_does_not_allow_is_a_typed_error(text, match):
    assert refused(text, match) < 1


@pytest.mark.parametrize(
    "text",
    [
        HEAD + ".entry a " * 20000,
        HEAD + ".entry a(" * 20000,
        HEAD + ".entry a" + " " * 200000,
        HEAD + ".visible " * 20000 + ".entry a",
        HEAD + "/*" * 100000,
        HEAD + "/" * 200000,
        HEAD + ".global .b8 x[" + " " * 100000 + ";" + kernel("mov"),
        HEAD + ".global .b8 x" + "[1]" * 50000 + "!;" + kernel("mov"),
        kernel("[" * 100000),
        kernel("mov.b32 x, " + "{" * 100000 + ";"),
        kernel("mov.b32 [" + "a" * 100000 + "!];"),
        kernel("a" * 200000),
        kernel("@%p" + " " * 100000 + ";"),
        kernel(".loc 1 1 1 " + "inlined_at 1 " * 20000 + "\nmov;"),
        kernel("", ".param .u64 " + "x" * 100000 + "!"),
    ],
    ids=range(15),
)
def test_no_text_takes_long(text):
    """Each of these has a repetition that a careless pattern would try in quadratically many ways."""
    assert refused(text) < 1


def test_a_label_behind_the_last_instruction_is_the_end_of_the_kernel():
    text = kernel(".reg .pred %p; setp.eq.s32 %p, 0, 0; @%p bra END; trap; ret; END:").replace("END:\nret;", "END:")
    with host.check("all"):
        host.RawModule(text).get_function("k")((1,), (32,), (np.zeros(1),))


def test_damaged_texts(capsys):
    """The same code as ``python -m bench.stress.damaged_ptx``, which reads thousands of them."""
    assert damaged_ptx.main(["--count", "60"]) == 0, capsys.readouterr().out
