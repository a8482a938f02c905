"""How much differential attention does, counted by the host executor, beside two calls of attention."""

from __future__ import annotations

import numpy as np
import pytest
from differential_calls import F16, make

import cuattn
from cuattn import host
from cuattn.runtime.executor import HostExecutor

N, D, E = 1024, 64, 128


@pytest.mark.parametrize(("shared", "reads"), ((False, 0.70), (True, 0.55)), ids=("v1", "v2"))
def test_work(monkeypatch, shared, reads):
    """One launch; a tile of v (and of shared keys) is read once for both streams; fewer instructions are issued."""
    q, k, v = make((1, N, N, 1, 1, D, E), F16, shared=shared)
    launches = []
    start = HostExecutor._start
    monkeypatch.setattr(
        HostExecutor, "_start", lambda self, kernel, *a: (launches.append(kernel.entry), start(self, kernel, *a))
    )
    with host.profile() as one:
        cuattn.differential_attention(q, k, v, 0.5, causal=True)
    assert launches == ["cuattn_differential_attention"]
    with host.profile() as two:
        for stream in range(2):
            cuattn.attention(q[:, :, stream::2], k if shared else k[:, :, stream::2], v, causal=True)
    assert one.bytes["global"]["read"] <= reads * two.bytes["global"]["read"]
    assert one.bytes["global"]["write"] == two.bytes["global"]["write"] / 2
    assert one.instructions["mma"] <= two.instructions["mma"]
    assert sum(one.instructions.values()) <= 0.95 * sum(two.instructions.values())


def test_what_is_not_asked_for_is_not_written():
    q, k, v = make((1, 64, 64, 1, 1, 32, 32), F16)
    with host.profile() as plain:
        cuattn.differential_attention(q, k, v, 0.5, causal=True)
    with host.profile() as kept:
        cuattn.differential_attention(q, k, v, 0.5, causal=True, return_state=True)
    out_bytes = 64 * 32 * 2
    assert plain.bytes["global"]["write"] == out_bytes
    assert kept.bytes["global"]["write"] == 3 * out_bytes + 2 * 64 * np.dtype(np.float32).itemsize
