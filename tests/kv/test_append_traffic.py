"""append_kv reads every number once and writes every code once: counted bytes of global memory, exactly."""

from __future__ import annotations

import numpy as np
import pytest

import cuattn
from cuattn import Rotary, host
from cuattn.formats import KV_FORMATS, numpy_dtype

TOKENS, HEADS, DIM, PAGE_SIZE, PAGES = 24, 2, 96, 16, 3
ROWS = 2 * TOKENS * HEADS  # a warp each
SLOT_BYTES = 32 * 8  # every lane of a warp reads the slot of its token: one sector
POSITION_BYTES = 32 * 4


def counted(name, *, per_slot=False, rope=None, misaligned=0, slots=None, dim=DIM):
    """Bytes of global memory read and written, and what the codes and scales of all tokens take."""
    row = KV_FORMATS[name]
    k = np.ones((TOKENS, HEADS, dim), np.float16)
    shape = (PAGES, PAGE_SIZE, HEADS)
    pages = []
    for _ in "kv":
        raw = np.zeros(np.prod(shape) * row.items(dim) * row.itemsize + misaligned, np.uint8)
        pages.append(raw[misaligned:].view(numpy_dtype(row.dtypes[0])).reshape(*shape, -1))
    options = {"rope": rope, "positions": np.arange(TOKENS, dtype=np.int32)} if rope is not None else {}
    for side in "kv":
        if per_slot:
            options[f"{side}_scale"] = np.zeros(shape, np.float32)
        if row.block_size:
            options[f"{side}_block_scales"] = np.zeros((*shape, row.blocks(dim)), np.uint8)
    slots = np.arange(TOKENS)[::-1] if slots is None else slots
    with host.profile() as profile:
        cuattn.append_kv(k, k, *pages, slots, kv_format=name, **options)
    assert profile.launches == 1
    moved = profile.bytes["global"]
    return moved["read"], moved["write"], 2 * k.nbytes, ROWS * (row.bytes_per_head(dim) + 4 * per_slot)


@pytest.mark.parametrize("misaligned", [0, 2], ids=["words", "items"])
@pytest.mark.parametrize("per_slot", [False, True], ids=["a scale for all", "a scale a slot"])
def test_numbers_once_and_codes_once_in_8_bits(per_slot, misaligned):
    for name in ("e4m3fn", "e5m2", "int8"):
        read, written, numbers, codes = counted(name, per_slot=per_slot, misaligned=misaligned)
        assert (read, written) == (numbers + ROWS * SLOT_BYTES, codes)


@pytest.mark.parametrize("misaligned", [0, 2], ids=["words", "items"])
@pytest.mark.parametrize("name", ["float16", "int8", "nvfp4", "mxfp4"])
def test_numbers_once_and_codes_once(name, misaligned):
    for dim in (DIM, 70):
        read, written, numbers, codes = counted(name, misaligned=misaligned, dim=dim)
        assert (read, written) == (numbers + ROWS * SLOT_BYTES, codes)


def test_rotations_are_read_once_a_row():
    """8 bytes a pair computed, 8 bytes a pair from tables: small things that stay in the caches of a GPU."""
    tables = np.ones((TOKENS, DIM // 2), np.float32)
    for rope in (Rotary(), Rotary(cos=tables, sin=tables)):
        read, written, numbers, codes = counted("int8", rope=rope)
        rotations = ROWS // 2 * (POSITION_BYTES + 8 * DIM // 2)
        assert (read, written) == (numbers + ROWS * SLOT_BYTES + rotations, codes)


def test_tokens_that_are_skipped_move_nothing():
    slots = np.where(np.arange(TOKENS) % 3 == 0, np.arange(TOKENS), -1)
    read, written, numbers, codes = counted("nvfp4", slots=slots)
    assert (read, written) == (numbers // 3 + ROWS * SLOT_BYTES, codes // 3)


def test_one_launch_instead_of_two_moves_half_of_the_keys():
    """`rope`, then an append of its result: what fusion saves."""
    _, fused_written, numbers, _ = counted("float16", rope=Rotary())
    k = np.ones((TOKENS, HEADS, DIM), np.float16)
    with host.profile() as profile:
        cuattn.rope(k, np.arange(TOKENS))
    _, written, _, _ = counted("float16")
    assert profile.bytes["global"]["write"] + written == fused_written + numbers // 2
