"""What the compiler makes of the rotary kernels."""

from __future__ import annotations

import pytest
from resource_cases import sampled

from cuattn import compile
from cuattn.ops.rotary.arguments import variants

VARIANTS = tuple(variants())


def spilled(source, constants, arch):
    (resources,) = compile.build(source, constants, arch=arch, kind="cubin").resources.values()
    return resources.spill_stores, resources.spill_loads, resources.stack_bytes


def test_the_table_of_variants():
    """Few, and each of them once."""
    unique = {(source, *sorted(constants.items())) for source, constants in VARIANTS}
    assert len(unique) == len(VARIANTS) == 2 * 18 + 4
    assert {source for source, _ in VARIANTS} == {"rope", "split_qkv"}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("source", ["rope", "split_qkv"])
def test_the_widest_do_not_spill(source, arch):
    """Of 16-bit elements, eight pairs a thread: the most registers. In half form, computed."""
    wide = [c for s, c in VARIANTS if s == source and c["Element"] == "__half" and not c["INTERLEAVED"]]
    for constants in wide:
        assert spilled(source, constants, arch) == (0, 0, 0), constants


@pytest.mark.parametrize(
    ("source", "constants", "arch"),
    sampled([(*variant, arch) for arch in ("sm_80", "sm_90a") for variant in VARIANTS], one_in=3),
)
def test_no_variant_spills(source, constants, arch):
    assert spilled(source, constants, arch) == (0, 0, 0)
