"""`cuattn-bench cache`, and the calls that `warmup` makes so that no later one waits."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

import cuattn
from cuattn import compile, environment
from cuattn.benchmark import warm
from cuattn.compile import cache, nvrtc
from cuattn.errors import ArgumentError
from cuattn.runtime.executor import host_executor
from cuattn.testing.cases import AttentionCase
from cuattn.testing.decode_cases import DecodeCase

Run = Callable[..., Result]


LONG = ("--seqlen", "4096")


def test_cache_from_empty_to_empty(run: Run, empty_cache: Path) -> None:
    assert json.loads(run("cache", "ls", "--json").stdout) == []
    result = run(
        "cache", "warmup", "--arch", "sm_80", "--dtype", "float16", "--head-dim", "20", "--for", "forward", *LONG
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.strip().startswith("2 kernels are ready for sm_80 (cubin)")
    names = [entry["name"] for entry in json.loads(run("cache", "ls", "--json").stdout)]
    assert len(names) == 2
    assert all(name.startswith("attention_forward-sm_80-") and name.endswith(".cubin") for name in names)
    (first, second) = json.loads(run("list", "variants", "--json").stdout)["variants"]
    assert "HEAD_DIM=32" in first["constants"]
    assert {"BOUND_RIGHT=true" in variant["constants"] for variant in (first, second)} == {True, False}
    assert "2 entries" in run("cache", "ls").stdout

    assert run("cache", "clear", input="n\n").exit_code == 1
    assert len(cuattn.compile.cache.ls()) == 2
    assert run("cache", "clear", input="y\n").stdout.endswith("2 entries deleted\n")
    assert run("cache", "clear").stdout == "0 entries deleted\n"


def test_no_call_waits_after_warmup(run: Run, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(
        "cache", "warmup", "--dtype", "float16", "--head-dim", "32", "--for", "forward", "--for", "decode", *LONG
    )
    assert result.exit_code == 0, result.output
    assert f"{environment.host_arch()} (ptx)" in result.stdout
    kinds = {entry["name"].rpartition(".")[2] for entry in json.loads(run("cache", "ls", "--json").stdout)}
    assert {"ptx", "tables"} <= kinds
    host_executor.cache_clear()
    compile.forget()
    monkeypatch.setattr(nvrtc, "compile", lambda *_, **__: pytest.fail("a call waits for its kernel"))
    for causal in (False, True):
        case = AttentionCase(1, 70, 3, 32, causal=causal)
        arrays = case.make_inputs()
        case.check(arrays, case.run(arrays))
    for page_size in (0, 16):
        decode = DecodeCase(2, 40, 4, 2, 32, page_size=page_size)
        arrays = decode.make_inputs()
        decode.check(arrays, decode.run(arrays))


def test_warmup_for_hopper_has_the_kernels_that_calls_take(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, str]] = []

    def build(kernel: str, constants: object, *, arch: str, kind: str) -> None:
        asked.append((kernel, arch, kind))

    monkeypatch.setattr(warm.compile, "build", build)
    names = []
    with warm.built(compile.Target("sm_90a", "cubin"), lambda source, *_: names.append(source)) as xp:
        for _, call in warm.calls(("forward", "backward", "decode", "varlen"), "bfloat16", 64):
            call(xp)
    assert {(arch, kind) for _, arch, kind in asked} == {("sm_90a", "cubin")}
    wanted = {"attention_forward_hopper", "attention_backward", "attention_decode", "attention_decode_reduce"}
    assert wanted <= {kernel for kernel, *_ in asked} == set(names)
    monkeypatch.undo()
    x = np.ones((1, 3), np.float32)
    np.testing.assert_allclose(cuattn.softmax(x), 1 / 3, rtol=1e-6)  # launches are back


def test_every_option_of_the_list_is_a_call() -> None:
    labels = [label for label, _ in warm.calls(warm.PARTS, "float16", 64, (128,))]
    assert len(labels) == len(set(labels))
    for option in warm.OPTIONS:
        assert f"forward float16 d64 n128 {option}" in labels and f"backward float16 d64 n128 {option}" in labels
    assert not any("backward" in label for label, _ in warm.calls(warm.PARTS, "float16", 512))


def entry(folder: Path, name: str, size: int, age_s: float) -> None:
    path = cache.write(name, ".bin", b"x" * size)
    for one in (path, path.with_name(path.name + ".meta")):
        os.utime(one, (1e9 - age_s, 1e9 - age_s))


def test_prune(run: Run, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for age, name in enumerate("abcd"):
        entry(empty_cache, name, 1000, 3600.0 * age)
    monkeypatch.setattr(cache.time, "time", lambda: 1e9)
    size = cache.ls()[0].size_bytes
    found = [one.name for one in cache.prune(max_bytes=3 * size, older_than_s=5000, dry_run=True)]
    assert found == ["d.bin", "c.bin"] and len(cache.ls()) == 4
    assert run("cache", "prune", "--max-size", f"{3 * size}", "--dry-run").stdout.startswith(
        "1 entries would be deleted"
    )
    assert run("cache", "prune", "--max-size", "1GiB").stdout.startswith("0 entries deleted")
    assert run("cache", "prune", "--older-than", "90m").exit_code == 0
    assert [one.name for one in cache.ls()] == ["a.bin", "b.bin"]
    assert cache.read("a", ".bin") == b"x" * 1000 and cache.read("c", ".bin") is None
    assert run("cache", "prune", "--max-size", "1b").stdout.endswith("0.0 MiB are left\n")
    assert cache.ls() == []
    for wrong in ({"max_bytes": -1}, {"older_than_s": float("nan")}):
        with pytest.raises(ArgumentError, match="a number from 0 on"):
            cache.prune(**wrong)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say what to keep"),
        (["--max-size", "much"], "'much' is no size"),
        (["--max-size", "-1MB"], "'-1MB' is no size"),
        (["--older-than", "30"], "'30' is no age"),
        (["--older-than", "d"], "'d' is no age"),
    ],
)
def test_prune_refuses(run: Run, arguments: list[str], words: str) -> None:
    result = run("cache", "prune", *arguments)
    assert result.exit_code == 2 and words in result.stderr
