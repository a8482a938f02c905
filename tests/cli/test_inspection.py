"""`cuattn-bench inspect`: names, one kernel in full, several in a line each, and what it needs."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from cli_results import is_one_line_error
from click.testing import Result

import cuattn

Run = Callable[..., Result]


def test_inspect_lists_what_can_be_named(run: Run) -> None:
    result = run("inspect")
    assert result.exit_code == 0
    for kernel in cuattn.compile.kernel_names():
        assert f"{kernel}/" in result.stdout
    names = json.loads(run("inspect", "--json").stdout)
    assert "rope/default" in names and len(names) == len(set(names))


def test_inspect_shows_one_kernel_in_full(run: Run) -> None:
    name = "attention_forward/float16_d64_128x64_w4_s2_plain"
    result = run("inspect", name)
    assert result.exit_code == 0, result.output
    for words in (
        *(name, "0 bytes of spills", "0 loads and stores of local memory", "no remarks on speed"),
        *(
            "132 multiprocessors of compute capability 9.0 at 1.83 GHz; not measured",
            "HMMA.16816.F32",
            "exp2 (special)",
        ),
        *("limited by", "TFLOP/s at most", "TFLOP/s without overlap"),
    ):
        assert words in result.stdout
    (kernel,) = json.loads(run("inspect", name, "--clock", "0.915", "--json").stdout)["kernels"]
    assert (kernel["name"], kernel["entry"], kernel["arch"]) == (name, "cuattn_attention_forward", "sm_90a")
    assert (kernel["constants"]["BLOCK_N"], kernel["work"], kernel["looped"]) == (64, "matrix products", True)
    (half,) = kernel["loops"]
    assert f"{2 * half['bound']['tflop_per_s']:.0f}" in result.stdout
    assert f"{2 * half['bound']['tflop_per_s_alone']:.0f}" in result.stdout


def test_inspect_gives_several_kernels_a_line_each(run: Run) -> None:
    result = run("inspect", "padding_*", "copy_pages/default")
    assert result.exit_code == 0, result.output
    words = result.stdout.split()
    for entry in ("padding_count", "padding_scan", "remove_padding", "restore_padding"):
        assert words.count(entry) == 1
    assert "TB/s" in words and "alone" not in result.stdout.partition("copy_pages")[2]  # a column that would be empty


def test_inspect_for_other_architectures(run: Run) -> None:
    result = run("inspect", "copy_pages", "--arch", "sm_80")
    assert "rates are known for compute capability 9.0 only" in result.stdout
    assert "limited by" not in result.stdout
    result = run("inspect", "attention_forward_hopper", "--arch", "sm_100a")
    assert is_one_line_error(result)
    assert "is for sm_90a and cannot be compiled for sm_100a" in result.stderr


def test_inspect_without_a_disassembler_or_with_an_unknown_name(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from cuattn.compile.sass import nvdisasm

    result = run("inspect", "speed")
    assert result.exit_code == 2
    assert "no kernel is called 'speed': kernels are append_kv, " in result.stderr
    monkeypatch.setattr(nvdisasm, "_candidates", lambda: iter(()))
    result = run("inspect", "copy_pages")
    assert is_one_line_error(result)
    assert "pip install nvidia-cuda-nvdisasm" in result.stderr
