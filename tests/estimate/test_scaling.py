"""Scaling on paper: bytes by the formulas, and where a ring hides its transfers."""

from __future__ import annotations

import pytest

from cuattn import estimate
from cuattn.errors import ArgumentError
from examples.parallel import scaling as program

CALL = {"seqlen": 2**17, "heads": 32, "kv_heads": 8, "head_dim": 128}


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_bytes_are_those_of_the_formulas(ranks):
    n, g, h, dims = CALL["seqlen"] // ranks, 8, 32, 256
    assert estimate.scaling(ranks, **CALL).bytes == (ranks - 1) * n * g * dims * 2
    ulysses = estimate.scaling(ranks, method="ulysses", **CALL)
    assert ulysses.bytes == (ranks - 1) * n * (h * 128 + g * dims + h * 128) * 2 // ranks
    nested = estimate.scaling(ranks, method="usp", **CALL)
    inside = min(ranks, 8)
    exchange = (inside - 1) * n * (h + g) * dims * 2 // inside
    assert nested.bytes == exchange + (ranks // inside - 1) * n * inside * (g // inside) * dims * 2


@pytest.mark.parametrize(("bytes_per_s", "tokens"), [(400e9, 1500), (50e9, 12_000)])
def test_a_ring_hides_from_so_many_tokens(bytes_per_s, tokens):
    """H200: 600 TFLOP/s; n >= 1500 G/H with NVLink, 12,000 G/H with a network; twice that when causal."""
    rates = {"flops_per_s": 600e12, "bytes_per_s": bytes_per_s}
    for causal, factor in ((False, 1), (True, 2)):
        given = {"heads": 32, "kv_heads": 8, "causal": causal}
        found = estimate.ring_hides_from(**rates, **given)
        assert found == pytest.approx(tokens / 4 * factor)
        wires = {"flops_per_s": 600e12, "link_bytes_per_s": bytes_per_s, "network_bytes_per_s": bytes_per_s}
        for per_rank, hidden in ((0.99, False), (1.01, True)):
            seqlen = round(16 * per_rank * found)
            assert estimate.scaling(16, seqlen=seqlen, head_dim=128, **given, **wires).hidden == hidden


def test_efficiency():
    one = estimate.scaling(1, **CALL)
    assert (one.efficiency, one.bytes, one.hidden) == (1.0, 0, False)
    for method in ("ring", "ulysses", "usp"):
        found = [estimate.scaling(ranks, method=method, **CALL) for ranks in (8, 32, 128, 512, 1024)]
        assert all(0 < x.efficiency <= 1 for x in found)
        assert all(x.time_s >= x.compute_s for x in found)
    fast = estimate.scaling(8, network_bytes_per_s=1.0, **CALL)  # one node: the network is not used
    assert fast.efficiency == pytest.approx(1.0)
    assert estimate.scaling(64, method="ulysses", **CALL).efficiency <= 0.5  # half of the ranks have no heads


@pytest.mark.parametrize(
    "change",
    [
        {"ranks": 0},
        {"seqlen": 1.5},
        {"kv_heads": 5},
        {"method": "tree"},
        {"flops_per_s": 0},
        {"link_bytes_per_s": float("nan")},
        {"network_bytes_per_s": "fast"},
        {"ranks_per_node": 0},
    ],
)
def test_refusals(change):
    with pytest.raises(ArgumentError, match=next(iter(change))):
        estimate.scaling(**{"ranks": 8, **CALL, **change})


def test_program(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["scaling"])
    program.main()
    printed = capsys.readouterr().out
    assert "assumed: flops_per_s 6e+14" in printed
    assert "kernels reach" in printed
    assert len([line for line in printed.splitlines() if line.strip().split(" ")[0].isdigit()]) == 8
