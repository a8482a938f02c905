"""`cuattn-bench estimate` and `explain`: figures by formulas, and how a call would run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import cuattn
from cli.main import main
from cuattn import estimate, host
from cuattn.benchmark.explained import explain
from cuattn.testing.attention_cases import AttentionCase


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="cuattn-bench")


def test_estimate_says_what_the_library_says() -> None:
    result = run("estimate", "llama-3-8b", "--batch", "2", "--seqlen", "1000", "--format", "int8", "--as", "json")
    assert result.exit_code == 0, result.output
    tables = json.loads(result.stdout)
    shape, memory, work, attention = tables.values()
    assert {row["what"]: row["value"] for row in shape}["parameters"] == estimate.parameters("Llama-3-8B")
    (row,) = memory
    assert row["cache, bytes"] == estimate.kv_cache_bytes("Llama-3-8B", 2, 1000, "int8")
    prefill, decode = work
    assert decode["FLOPs"] == estimate.flops("Llama-3-8B", 2, 1000, phase="decode", logits=1)
    assert prefill["bound by"] == "compute" and decode["bound by"] == "memory"
    assert attention[0]["least"] < attention[0]["tiles of 128 queries"] < attention[0]["standard"]


def test_estimate_draws_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.svg"
    result = run("estimate", "SmolLM2-135M", "--plot", str(path))
    assert result.exit_code == 0 and f"drawn to {path}" in result.stdout
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("estimate", "GPT-9"), "'GPT-9' is not one of 'SmolLM2-135M'"),
        (("estimate", "GPT-2", "--format", "int9"), "int9"),
        (("estimate", "GPT-2", "--plot", "picture.txt"), "no name of a picture"),
        (("estimate", "GPT-2", "--plot", "no/such/folder/picture.png"), "cannot write"),
        (("explain", "--gpu", "H300"), "'H300' is not one of 'A100-40GB'"),
        (("explain", "--heads", "3", "--kv-heads", "2"), "no multiple of 2"),
        (("explain", "--window", "5,many"), "many"),
        (("explain", "--dtype", "float16", "--precision", "tf32"), "tf32"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code in (1, 2) and message in result.stderr and "Traceback" not in result.output


def test_explain_says_which_kernel_and_why() -> None:
    problem = ("--batch", "2", "--heads", "4", "--seqlen", "200", "--seqlen-k", "300", "--kv-heads", "2")
    arguments = ("explain", *problem, "--head-dim", "32", "--dtype", "float16", "--gpu", "a100")
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    for word in ("attention_forward", "sm_80", "not the Hopper kernel", "CTAs", "registers", "none spilled", "bound"):
        assert word in result.stdout
    found = json.loads(run(*arguments, "--json").stdout)
    assert found["kernel"] == "attention_forward" and found["spill_bytes"] == 0
    assert found["num_ctas"] == 2 * 4 * -(-200 // found["row"]["block_m"])


@pytest.mark.parametrize("bounds", ({}, {"window": (20, 9)}), ids=str)
def test_asked_bytes_are_those_that_are_counted(bounds: dict[str, object]) -> None:
    """On the host executor, whose kernels are those of an A100: all that tiles read and write, and lse."""
    case = AttentionCase(2, 200, 4, 32, seqlen_k=300, num_kv_heads=2, **bounds)  # type: ignore[arg-type]
    inputs = case.make_inputs()
    with host.profile() as profile:
        cuattn.attention(**inputs, **case.options, return_lse=True)
    moved = profile.bytes["global"]
    found = explain(case, "A100")
    assert 300 % found.path.row.block_n and found.asked_bytes == moved["read"] + moved["write"]


def test_the_work_of_visible_keys() -> None:
    case = AttentionCase(1, 5, 1, 8, seqlen_k=7, causal=True, window=(2, 0))
    begin, end = case.visible_keys()
    assert (end - begin == 3).all() and case.flops == 2 * 15 * 16 and np.array_equal(end, [3, 4, 5, 6, 7])
