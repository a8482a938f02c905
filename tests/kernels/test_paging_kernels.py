"""What the compiler makes of the kernels that write into caches."""

from __future__ import annotations

import pytest

from cuattn import compile
from cuattn.kv.append import variants
from cuattn.kv.copy import UNITS
from cuattn.kv.copy import constants as copy_constants

VARIANTS = tuple(variants())


def spilled(source, constants, arch):
    (resources,) = compile.build(source, constants, arch=arch, kind="cubin").resources.values()
    return resources.spill_stores, resources.spill_loads, resources.stack_bytes


def test_the_table_of_variants():
    """Three dtypes in themselves and five formats, float64 in itself; each with five rotations, or seven."""
    unique = {tuple(sorted(constants.items())) for constants in VARIANTS}
    assert len(unique) == len(VARIANTS) == 3 * 6 * 5 + 7


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_the_widest_do_not_spill(arch):
    """Of 16-bit keys that are turned by computed angles, or of float64: the most registers of each format."""
    wide = [c for c in VARIANTS if c["ROTATE"] and not c["TABLES"] and c["INTERLEAVED"] == (arch == "sm_80")]
    chosen = {"struct Float8E4M3", "struct NvFp4", "double"} if arch == "sm_80" else {c["Storage"] for c in wide}
    for constants in wide:
        if constants["Storage"] in chosen and constants["Element"] in ("__half", "double"):
            assert spilled("append_kv", constants, arch) == (0, 0, 0), constants


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_copies_do_not_spill(arch):
    for unit_bytes in UNITS:
        assert spilled("copy_pages", copy_constants(unit_bytes), arch) == (0, 0, 0), unit_bytes
    assert spilled("slot_mapping", {"NUM_THREADS": 128}, arch) == (0, 0, 0)
