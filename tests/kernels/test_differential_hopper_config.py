"""Shapes of the Hopper kernel of differential attention: which calls take it, what is legal, registers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from differential_calls import BF16, F16, F32, make
from resource_cases import sampled

import cuattn
from cuattn import compile
from cuattn.errors import ArgumentError, LaunchError, NotSupportedError
from cuattn.ops.attention.shipped import CAUSAL
from cuattn.ops.attention.variants import ForwardOptions
from cuattn.ops.differential.hopper_config import HOPPER_DIFFERENTIAL_CONFIGS, select_row
from cuattn.ops.differential.kernels import GROUPS
from cuattn.testing import kernels

LIMIT = 227 * 1024
SIZES = (64, 96, 128, 192, 256)
GOOD = HOPPER_DIFFERENTIAL_CONFIGS[0]


def test_head_dims_up_to_128_have_a_row_and_every_row_a_problem():
    found = set()
    for shared in (False, True):
        for head_dim in SIZES:
            for head_dim_v in SIZES:
                row = select_row(head_dim, head_dim_v, shared, LIMIT)
                assert (row is None) == (head_dim > 128)
                if row is not None:
                    assert row.is_legal(head_dim, head_dim_v, LIMIT, shared_keys=shared)
                    assert head_dim <= row.max_head_dim and head_dim_v <= row.max_head_dim_v
                    found.add(row)
    assert found == set(HOPPER_DIFFERENTIAL_CONFIGS)
    assert select_row(64, 64, True, 4096) is None


@pytest.mark.parametrize(
    "change",
    (
        *({"num_stages": 1}, {"block_n": 120}, {"block_n": 272}, {"producer_registers": 28}),
        *({"producer_registers": 48}, {"consumer_registers": 160}, {"consumer_registers": 264}, {"num_stages": 5}),
    ),
    ids=str,
)
def test_illegal_rows(change):
    assert GOOD.is_legal(64, 128, LIMIT, shared_keys=False)
    assert not dataclasses.replace(GOOD, **change).is_legal(64, 128, LIMIT, shared_keys=False)


def test_shared_memory_is_what_the_tiles_take():
    """Queries of both streams, two stages of keys and values, and the output of a stream in float."""
    tiles = 2 * 64 * 64 + 2 * 128 * (2 * 64 + 128)
    assert GOOD.smem_bytes(64, 128, shared_keys=False) == 2 * tiles + 64 * 128 * 4 + 1024
    assert GOOD.smem_bytes(64, 128, shared_keys=True) == 2 * (tiles - 2 * 128 * 64) + 64 * 128 * 4 + 1024


def test_constants():
    """One value for each constant that the kernel's header names, and no other but the flags of options."""
    options = ForwardOptions(bound_right=True)
    constants = GOOD.constants("bfloat16", 64, 128, options, shared_keys=True)
    assert {name: constants[name] for name in constants if name not in options.constants()} == {
        "Element": "__nv_bfloat16",
        "SHARED_KEYS": True,
        "BLOCK_M": 64,
        "BLOCK_N": 128,
        "CONSUMER_REGISTERS": 232,
        "HEAD_DIM": 64,
        "HEAD_DIM_V": 128,
        "NUM_STAGES": 2,
        "PING_PONG": True,
        "PRODUCER_REGISTERS": 40,
        "SMEM_BYTES": GOOD.smem_bytes(64, 128, shared_keys=True),
    }


# --- which kernel a call takes ----------------------------------------------------------------------------------------


def path_of(shape, dtype=F16, *, shared=False, arch="sm_90a", **options):
    return cuattn.forward_path(*make(shape, dtype, shared=shared), lambda_=0.5, arch=arch, **options)


def test_calls_of_16_bits_take_it():
    for dtype, shared in ((F16, False), (BF16, True)):
        path = path_of((1, 40, 70, 4, 2, 64, 128), dtype, shared=shared, causal=True, norm=True)
        assert (path.kernel, path.row, path.options, path.arch) == (GOOD.source, GOOD, CAUSAL, "sm_90a")
        assert path.reason == "sm_90a has wgmma, and nothing in the call is against it"
    assert path_of((1, 4, 7, 1, 1, 128, 128)).row.block_n == 96
    assert path_of((1, 4, 7, 1, 1, 128, 128), shared=True).row.block_n == 128
    assert path_of((1, 4, 7, 1, 1, 128, 256), chunk=3, softcap=2.0, alibi_slopes=[0.5, 1.0]).row.block_n == 64


@pytest.mark.parametrize(
    ("call", "kernel", "why"),
    (
        ({"arch": "sm_80"}, "differential_attention", "kernels are compiled for sm_80"),
        ({"dtype": F32}, "differential_attention_fma", "the elements are float32"),
        ({"dropout_p": 0.5}, "differential_attention", "the call has dropout"),
        ({"mask": np.ones((5, 9), bool)}, "differential_attention", "the call has a mask"),
        ({"shape": (1, 5, 9, 1, 1, 12, 16)}, "differential_attention", "24, no multiple of 16"),
        ({"shape": (1, 5, 9, 1, 1, 256, 256)}, "differential_attention", "no shape of it serves head dims 256 and 256"),
        ({"shape": (0, 5, 9, 1, 1, 16, 16)}, "differential_attention", "nothing to compute"),
    ),
    ids=lambda x: "" if isinstance(x, dict) else x,
)
def test_others_say_why_not(call, kernel, why):
    path = path_of(call.pop("shape", (1, 5, 9, 1, 1, 16, 16)), **call)
    assert path.kernel == kernel and path.reason.startswith("not the Hopper kernel: "), path
    assert why in path.reason.replace(" bytes", ""), path


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("CUATTN_HOPPER", "off")
    assert path_of((1, 5, 9, 1, 1, 16, 16)).reason == "not the Hopper kernel: CUATTN_HOPPER=off"


def test_what_is_no_call_of_it_is_refused():
    q, k, v = make((1, 5, 9, 1, 1, 16, 16), F16)
    starts = np.int32([0, 5])
    with pytest.raises(ArgumentError, match="beside lambda_; differential attention takes None"):
        cuattn.forward_path(q, k, v, starts, starts, lambda_=0.5)
    with pytest.raises(NotSupportedError, match="the call has dropout"):
        kernels.differential_attention(q, k, v, 0.5, config=GOOD, dropout_p=0.5)
    wide = make((1, 5, 9, 1, 1, 128, 128), F16)
    with pytest.raises(LaunchError, match="is not legal for head dims 128 and 128"):
        kernels.differential_attention(*wide, 0.5, config=GOOD)


# --- registers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant", sampled([(variant,) for variant in GROUPS[1].variants()], one_in=9), ids=lambda variant: variant.row
)
def test_no_row_spills(variant):
    binary = compile.build(variant.kernel, variant.constants, arch="sm_90a", kind="cubin")
    resources = binary.resources[GOOD.entry]
    assert (resources.spill_stores, resources.spill_loads, resources.stack_bytes) == (0, 0, 0), resources
    assert "Potential Performance Loss" not in binary.log
