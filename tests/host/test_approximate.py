"""The host's own accuracy of the .approx instructions, tighter than what PTX promises, and the same on every ISA."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cuattn.host as host
from cuattn.host import library
from cuattn.testing.rounding import ulp

PTX = """
.version 7.1
.target sm_80
.address_size 64
.visible .entry {name}(.param .u64 px, .param .u64 py)
{{
.reg .b64 %x, %y, %o; .reg .b32 %i, %b; .reg .f32 %f<2>;
ld.param.u64 %x, [px]; ld.param.u64 %y, [py];
mov.u32 %i, %ctaid.x; mov.u32 %b, %ntid.x; mul.lo.u32 %i, %i, %b; mov.u32 %b, %tid.x; add.u32 %i, %i, %b;
mul.wide.u32 %o, %i, 4; add.s64 %x, %x, %o; add.s64 %y, %y, %o;
ld.global.f32 %f0, [%x];
{opcode} %f1, %f0;
st.global.f32 [%y], %f1;
ret;
}}
"""


def apply(opcode, x):
    """One instruction on every element of a float32 array whose size is a multiple of 256."""
    kernel = host.RawModule(code=PTX.format(name="k", opcode=opcode)).get_function("k")
    y = np.empty_like(x)
    kernel((x.size // 256,), (256,), (x, y))
    return y


def values(low, high, count=1 << 16):
    """float32 numbers spread evenly, and as many spread evenly over the bit patterns between."""
    generator = np.random.default_rng(7)
    even = generator.uniform(low, high, count // 2).astype(np.float32)
    if low > 0:
        first, last = (int(np.float32(v).view(np.uint32)) for v in (low, high))
        bits = generator.integers(first, last, count // 2, dtype=np.uint32).view(np.float32)
    else:
        bits = (generator.uniform(-1, 1, count // 2) * np.exp2(generator.uniform(-30, 0, count // 2)) * high).astype(
            np.float32
        )
    return np.concatenate([even, bits])


TINY = np.finfo(np.float32).smallest_subnormal
FUNCTIONS = {
    "ex2.approx.f32": (np.exp2, (-150.0, 128.0), 1.2),
    "lg2.approx.f32": (np.log2, (TINY, 3e38), 0.51),
    "rcp.approx.f32": (lambda x: 1 / x, (TINY * 2**24, 3e38), 0.5),
    "sqrt.approx.f32": (np.sqrt, (TINY, 3e38), 0.5),
    "rsqrt.approx.f32": (lambda x: 1 / np.sqrt(x), (TINY, 3e38), 0.51),
    "sin.approx.f32": (np.sin, (-4.0, 4.0), 0.51),
    "cos.approx.f32": (np.cos, (-4.0, 4.0), 0.51),
    "tanh.approx.f32": (np.tanh, (-12.0, 12.0), 0.51),
}


@pytest.mark.parametrize("opcode", FUNCTIONS)
def test_accuracy(opcode):
    function, (low, high), bound = FUNCTIONS[opcode]
    x = values(low, high)
    exact = function(x.astype(np.float64))
    error = np.abs(apply(opcode, x).astype(np.float64) - exact) / ulp(exact, np.float32)
    worst = np.argmax(error)
    assert error[worst] <= bound, f"{error[worst]:.3f} ulp at {x[worst]!r}"


def test_ex2_of_integers_is_exact_down_to_the_last_subnormal():
    x = np.zeros(512, np.float32)
    x[:288] = np.arange(-160, 128)
    np.testing.assert_array_equal(apply("ex2.approx.f32", x), np.exp2(x.astype(np.float64)).astype(np.float32))


def test_lg2_of_powers_of_two_is_exact():
    exponents = np.arange(-149, 107)
    np.testing.assert_array_equal(apply("lg2.approx.f32", np.exp2(exponents).astype(np.float32)), exponents)


def test_ex2_never_decreases():
    x = np.sort(values(-150.0, 128.0))
    assert (np.diff(apply("ex2.approx.f32", x)) >= 0).all()


def digest():
    """Hash of what every approximate instruction gives."""
    results = [apply(opcode, values(*FUNCTIONS[opcode][1], count=4096)) for opcode in FUNCTIONS]
    return hashlib.sha256(np.concatenate(results).tobytes()).hexdigest()


def test_every_instruction_set_gives_the_same_bits():
    root = Path(__file__).parents[2]
    program = "import sys; sys.path[:0] = sys.argv[1:]; import test_approximate; print(test_approximate.digest())"
    digests = {}
    for isa in library.load().isas:
        environment = {**os.environ, "CUATTN_HOST_ISA": isa}
        command = [sys.executable, "-c", program, str(root), str(Path(__file__).parent)]
        digests[isa] = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert len(set(digests.values())) == 1, digests
