"""What the gradients of linear attention take: work that grows with the tokens, a state for each chunk; no spills."""

from __future__ import annotations

import numpy as np
import pytest
from idle_executor import install
from linear_calls import BF16, F32, F64, decay_like, qkv
from resource_cases import left_out

import cuattn
from cuattn import compile as kernel_compiler
from cuattn import host
from cuattn.ops.linear import backward_config
from cuattn.ops.linear.kernels import GROUPS

VARIANTS = next(group for group in GROUPS if group.name == "linear_attention_backward").variants


def call(dtype, seqlen, kind, heads=(2, 1, 1), dims=(32, 32), **options):
    rng = np.random.default_rng(0)
    q, k, v = qkv(rng, dtype, seqlen, heads, dims, batch=1)
    dout = rng.standard_normal((1, seqlen, max(heads), dims[1])).astype(dtype)
    decay = decay_like(rng, k, v, kind)
    decay = None if decay is None else decay.astype(np.float64 if dtype == F64 else np.float32)
    return cuattn.linear_attention_backward(dout, q, k, v, decay=decay, **options)


@pytest.mark.parametrize("kind", ("token", "channel"))
def test_twice_the_tokens_are_twice_the_work(kind):
    counts = []
    for seqlen in (256, 512):
        with host.check(), host.profile() as profile:
            call(BF16, seqlen, kind)
        counts.append((profile.warp_instructions, profile.bytes["global"]["read"], profile.bytes["global"]["write"]))
        assert profile.launches == (9 if kind == "token" else 8)
    for half, whole in zip(*counts, strict=True):
        assert whole / half == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(("dtype", "chunk"), ((BF16, 64), (F32, 64), (F64, 32)), ids=str)
@pytest.mark.parametrize("kind", (None, "head", "token", "channel"))
def test_one_state_a_chunk_is_all_that_is_kept(monkeypatch, dtype, chunk, kind):
    """Nothing grows with N x M; the numbers of tokens are few, and those of channels no more than q has, or k."""
    seqlen, dims, heads = 1000, (40, 72), (2, 1, 1)
    idle = install(monkeypatch)
    call(dtype, seqlen, kind, heads, dims)
    sizes = [x.size for x in idle.allocated]
    chunks = -(-seqlen // chunk)
    results = seqlen * (2 * (2 * dims[0] + dims[0]) + dims[1])  # and q and k, mapped
    states = chunks * dims[0] * dims[1]
    assert max(sizes) <= max(states, 2 * seqlen * dims[0])
    per_token = {None: 0, "head": 2 + 3 + 2, "token": 2 + 3 + 2, "channel": 3 * dims[0]}[kind] + 4
    per_chunk = dims[0] + 2 * -(-dims[1] // chunk) * (1 + dims[0])
    assert sum(sizes) <= results + states + per_token * seqlen + per_chunk * chunks + 8


def test_the_table_of_variants():
    names = [variant.name for variant in VARIANTS()]
    assert len(set(names)) == len(names) == 12
    for itemsize in (2, 4, 8):
        for channels in (False, True):
            assert max(backward_config.smem_bytes(itemsize, channels=channels).values()) <= 99 * 1024


def _resources():
    """The one that uses most registers; the others where all are asked for."""
    cases = [(arch, variant) for arch in ("sm_80", "sm_90a") for variant in VARIANTS()]
    chosen = [case for case in cases if (case[0], case[1].row) == ("sm_90a", "float16_channels")]
    return [*chosen, *left_out(case for case in cases if case not in chosen)]


@pytest.mark.parametrize(("arch", "variant"), _resources(), ids=lambda x: getattr(x, "row", x))
def test_nothing_spills(arch, variant):
    binary = kernel_compiler.build(variant.kernel, variant.constants, arch=arch, kind="cubin")
    assert len(binary.resources) == 9
    for entry, of in binary.resources.items():
        assert (of.spill_stores, of.spill_loads, of.stack_bytes) == (0, 0, 0), entry
        assert of.registers * variant.num_threads <= 65536
