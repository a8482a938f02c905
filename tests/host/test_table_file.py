"""Tables as bytes: what was written comes back, and nothing else is taken for a table."""

from __future__ import annotations

import dataclasses
import random
import struct

import numpy as np
import pytest

from cuattn.host import library, ptx, table_file
from cuattn.host.table import build_table

PTX = """
.version 7.1
.target sm_90
.address_size 64
.global .align 4 .b8 numbers[8] = {1, 2, 3, 4, 5, 6, 7, 8};
.const .align 8 .u64 empty;
.visible .entry first(.param .u64 out, .param .u32 n) .maxntid 64, 1, 1 .reqnctapercluster 2, 1, 1
{
.reg .b64 %out, %at; .reg .b32 %x, %t; .reg .pred %p; .shared .align 4 .b8 room[64];
ld.param.u64 %out, [out]; mov.u32 %t, %tid.x; mov.u64 %at, numbers;
setp.gt.u32 %p, %t, 1;
@%p bra DONE;
ld.global.u32 %x, [%at+4]; st.shared.u32 [room], %x; st.global.u32 [%out], %x;
DONE:
ret;
}
.visible .entry second() { ret; }
"""


def tables():
    module = ptx.parse(PTX)
    return {name: build_table(module, entry) for name, entry in module.entries.items()}, module.target


@pytest.fixture(scope="module")
def written():
    return table_file.encode(*tables())


def test_what_was_written_comes_back(written):
    wanted, target = tables()
    found, found_target = table_file.decode(written, library.op_index())
    assert (list(found), found_target) == (list(wanted), target)
    for name, table in wanted.items():
        for field in dataclasses.fields(table):
            expected, actual = getattr(table, field.name), getattr(found[name], field.name)
            if isinstance(expected, np.ndarray):
                assert expected.dtype == actual.dtype
                assert expected.shape == actual.shape
                assert actual.ctypes.data % actual.itemsize == 0
                expected, actual = expected.tolist(), actual.tolist()
            assert (type(actual), actual) == (type(expected), expected), field.name
    assert table_file.encode(found, found_target) == written


def refuses(data: bytes) -> bool:
    """Whether bytes are refused as they must be: a table that is not is at least one in form."""
    try:
        found, _ = table_file.decode(data, library.op_index())
    except ValueError:
        return True
    for table in found.values():
        top = table.reg_bytes
        assert len(table.rows) == len(table.op_names) == len(table.texts) == len(table.locations) > 0
        assert set(table.op_names) <= library.op_index().keys()
        assert len(table.slots_init) <= top <= 1 << 28
        assert all(0 <= p.offset < p.offset + p.size <= table.param_bytes for p in table.params)
        assert all(v.data is None or len(v.data) <= v.size for v in table.module_variables)
    return False


def test_every_truncation_is_refused(written):
    assert all(refuses(written[:size]) for size in range(0, len(written), 7))
    assert refuses(written + bytes(8))


def test_random_bytes_are_refused(written):
    draw = random.Random(1)
    for _ in range(300):
        noise = draw.randbytes(draw.randrange(400))
        assert refuses(noise)
        assert refuses(written[:8] + noise)


def test_flipped_bits_are_refused_or_harmless_in_form(written):
    draw = random.Random(2)
    refused = 0
    for _ in range(1500):
        data = bytearray(written)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        refused += refuses(bytes(data))
    assert refused > 100


@pytest.mark.parametrize("length", [0, 1, 7, 2**31, 2**63, 2**64 - 1])
def test_lengths_of_blocks_are_checked(length, written):
    at = 8
    while at < len(written):  # the length of every block in turn
        (was,) = struct.unpack_from("<Q", written, at)
        if was != length:
            assert refuses(written[:at] + struct.pack("<Q", length) + written[at + 8 :]) or length < 8
        at += 8 + was + -was % 8


def test_a_library_without_a_handler_refuses(written):
    with pytest.raises(ValueError, match="handler"):
        table_file.decode(written, {"ret": 0})
