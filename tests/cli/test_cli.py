"""`cuattn-bench`: every command, and what it says to wrong input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from cli_results import is_one_line_error
from click.testing import Result

import cuattn
from cli.commands import COMMANDS
from cli.main import main
from cuattn import benchmark
from cuattn.benchmark import from_json, machine, variants
from cuattn.benchmark.suite import Step, Suite
from cuattn.ops.attention.backward.config import FLASH_BWD_CONFIGS
from cuattn.ops.decode.config import FLASH_DECODE_CONFIGS

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--dtype", "float16", "--seqlen", "16", "--head-dim", "32", "--budget", "0.01", "--executor", "host")

Run = Callable[..., Result]


def commands(group: click.Command = main, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [prefix]
    if isinstance(group, click.Group):
        context = click.Context(group)
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None
            found += commands(command, (*prefix, name))
    return found


@pytest.mark.parametrize("path", commands(), ids=lambda path: " ".join(path) or "main")
def test_help(run: Run, path: tuple[str, ...]) -> None:
    result = run(*path, "--help")
    assert result.exit_code == 0
    assert path == ("cache",) or f"cuattn-bench {' '.join(path)}".strip() in result.stdout.split("Examples:")[1]
    assert run(*path, "-h").stdout == result.stdout


def test_commands_are_those_that_are_promised() -> None:
    assert {path[0] for path in commands() if path} == set(COMMANDS)
    assert {path[1] for path in commands() if len(path) == 2} == {"ls", "clear", "prune", "warmup"}


def test_summaries_are_those_of_the_commands() -> None:
    context = click.Context(main)
    for name, entry in COMMANDS.items():
        command = main.get_command(context, name)
        assert command is not None
        assert command.help is not None and command.help.partition("\n\n")[0] == entry.summary
        assert entry.summary.endswith(".") and len(entry.summary) <= 80


def test_help_imports_no_command_and_takes_no_time() -> None:
    """Processor time of the program alone: what Python itself takes to start is left out."""
    program = (
        "import sys, time; began = time.process_time(); from cli.main import main; "
        "main(['--help'], standalone_mode=False); took = time.process_time() - began; "
        "print(*sys.modules, file=sys.stderr); sys.exit(f'{took=}' if took > 0.25 else 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-200:]
    assert "info" in result.stdout
    loaded = set(result.stderr.split())
    assert not loaded & {"numpy", "rich", "cli.run", "cli.info", "unittest", "cuattn.benchmark"}


def test_commands_import_what_is_heavy_only_when_it_is_used() -> None:
    program = (
        "import importlib, sys; from cli.commands import COMMANDS; "
        "[importlib.import_module(f'cli.{entry.module}') for entry in COMMANDS.values()]; print(*sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"unittest", "scipy", "matplotlib", "torch", "cupy", "jax", "hypothesis", "pytest"}
    assert set(result.stdout.split()) & heavy == set()


def test_version(run: Run) -> None:
    assert run("--version").stdout.strip() == f"cuattn-bench, version {cuattn.__version__}"


@pytest.mark.smoke
def test_alone_it_says_what_is_here_and_runs_the_short_suite(run: Run) -> None:
    result = run()
    assert result.exit_code == 0, result.output
    for word in ("host executor", "GPU", "NVRTC", "CuPy", "attention_forward", "cache", "smoke", "N 16"):
        assert word in result.stdout


def test_info(run: Run) -> None:
    result = run("info")
    assert result.exit_code == 0
    assert cuattn.__version__ in result.stdout
    data = json.loads(run("info", "--json").stdout)
    assert len(result.stdout.splitlines()) == 2 + len(data)  # a line for each fact, below title and heading
    words = result.stdout.split()
    for name in ("cpu_cores", "host_isa", "nvrtc", "numpy", "source_sha256", "cache"):
        assert f"{data[name]:,}" in words if isinstance(data[name], int) else str(data[name]) in words, name
    assert data["cache_writable"] is True and Path(data["cache"]).is_dir()
    assert data["cuattn"] == cuattn.__version__
    assert (data["gpu"] is not None) == machine.has_gpu()


def test_info_without_a_compiler_says_what_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from cuattn.errors import HostUnavailableError
    from cuattn.host import library

    def missing() -> None:
        raise HostUnavailableError("no C compiler was found")

    monkeypatch.setattr(library, "load", missing)
    result = run("info")
    assert result.exit_code == 0
    assert "not available: no C compiler was found" in result.stdout


@pytest.mark.parametrize("topic", ["suites", "kernels", "rows", "variants"])
def test_list(run: Run, topic: str) -> None:
    result = run("list", topic)
    assert result.exit_code == 0
    assert run("list", topic, "--json").exit_code == 0
    wanted = {
        "suites": "latency",
        "kernels": "cuattn_softmax_partial",
        "rows": "attention rows",
        "variants": "variants (",
    }
    assert wanted[topic] in result.stdout


def test_list_json(run: Run) -> None:
    data = json.loads(run("list", "--json").stdout)
    assert set(data) == {
        *("suites", "kernels", "attention rows", "attention backward rows", "attention decode rows"),
        *("attention options", "softmax rows", "variants"),
    }
    assert {kernel["name"] for kernel in data["kernels"]} == set(cuattn.compile.kernel_names())
    assert all(kernel["entries"] for kernel in data["kernels"])
    assert len(data["attention rows"]) == len(cuattn.ops.attention.forward.config.FLASH_FWD_CONFIGS)
    assert len(data["attention backward rows"]) == len(FLASH_BWD_CONFIGS)
    assert len(data["attention decode rows"]) == len(FLASH_DECODE_CONFIGS)
    options = {row["options"]: row["compiled in"] for row in data["attention options"]}
    assert (options["plain"], options["causal"]) == ("", "BOUND_RIGHT")
    assert options["everything_float32"].split() == [
        *("BOUND_LEFT", "BOUND_RIGHT", "SOFTCAP", "ALIBI", "BIAS", "MASK", "DROPOUT"),
    ]


def test_list_resources(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    backward = next(variants.launched("attention_backward"))
    forward = next(variants.launched("attention_forward"))
    decoding = next(variants.launched("attention_decode"))
    monkeypatch.setattr(variants, "all_attention", lambda: [forward, backward, decoding])
    rows = json.loads(run("list", "resources", "--json").stdout)["resources"]
    wanted = [(variant.label, arch) for variant in (forward, backward, decoding) for arch in ("sm_80", "sm_90a")]
    assert [(row["kernel"], row["arch"]) for row in rows] == wanted
    for row in rows:
        assert row["spill_bytes"] == 0
        assert 16 <= row["registers"] <= 255
        assert row["ctas_per_sm"] >= 1


def test_run_writes_json(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    result = run("run", "attention", *TINY, "--json", str(path))
    assert result.exit_code == 0, result.output
    report = from_json(path.read_text(encoding="utf-8"))
    assert [record.case for record in report.records] == [
        "attention_b1_n16_m16_h8_g8_d32_e32_float16",
        "attention_b1_n16_m16_h8_g8_d32_e32_float16_causal",
    ]
    assert str(tmp_path) not in path.read_text()
    assert "GFLOP/s" in result.stdout
    assert "says nothing about a GPU" in result.stdout


def test_a_failing_suite_gives_its_reason_and_exit_code_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(options: benchmark.Options) -> list[Step]:
        def raises() -> None:
            raise RuntimeError("out of luck")

        return [Step("softmax", "unlucky", 1.0, raises)]  # type: ignore[arg-type]

    monkeypatch.setitem(benchmark.SUITES, "softmax", Suite("softmax", "fails", fails))
    result = run("run", "smoke", "softmax")
    assert result.exit_code == 1
    assert "softmax, unlucky, cuattn: RuntimeError: out of luck" in result.stdout
    assert "N 16" in result.stdout  # the other suite ran


def test_a_missed_goal_is_named_and_gives_exit_code_1_where_that_is_asked_for(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(options: benchmark.Options) -> list[Step]:
        goal = {"fraction_of_unchecked": ">= 0.2"}
        values = {"slow": {"fraction_of_unchecked": 0.153}, "good": {"fraction_of_unchecked": 0.25}}
        records = [benchmark.Record("softmax", name, metrics, goals=goal) for name, metrics in values.items()]
        return [Step("softmax", "both", 1.0, lambda: records)]

    monkeypatch.setitem(benchmark.SUITES, "softmax", Suite("softmax", "misses", measured))
    assert run("run", "softmax").exit_code == 0
    result = run("run", "softmax", "--check")
    assert result.exit_code == 1
    assert "reached: >= 0.2" in result.stdout and "missed: >= 0.2" in result.stdout
    assert "missed: softmax, slow: fraction of unchecked is 0.153, goal >= 0.2" in result.stdout
    assert "missed: softmax, good" not in result.stdout
    assert "1 of 2 goals reached" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-command"], "No such command 'no-such-command'"),
        (["run", "speed"], "'speed' is not one of 'smoke', 'attention'"),
        (["run", "--dtype", "int8"], "'int8' is not one of 'float16'"),
        (["run", "--seqlen", "0"], "0 is not in the range"),
        (["run", "--head-dim", "513"], "513 is not in the range"),
        (["run", "--budget", "0"], "0.0 is not in the range"),
        (["run", "--seed", "-1"], "-1 is not in the range"),
        (["run", "--executor", "tpu"], "'tpu' is not one of 'auto', 'host', 'cuda'"),
        (["run", "--json", "no/such/folder/x.json"], "is not a directory"),
        (["run", "--json", "."], "is a directory"),
        (["run", "softmax", "--heads", "4"], "the suite softmax does not read --heads; attention, backward, decode"),
        (["run", "attention", "softmax", "--head-dim", "8"], "the suite softmax does not read --head-dim"),
        (["run", "counters", "--budget", "1"], "the suite counters does not read --budget"),
        (["run", "decode", "--no-peers"], "the suite decode does not read --no-peers"),
        (["run", "--heads", "4", "--kv-heads", "3"], "4 query heads are no multiple of 3 key/value heads"),
        (["run", "decode", "--queries", "9", "--seqlen", "4"], "9 queries are more than the 4 keys"),
        (["run", "--window", "1,2,3"], "'1,2,3' is not LEFT or LEFT,RIGHT"),
        (["run", "--window", "-1"], "'-1' is not LEFT or LEFT,RIGHT"),
        (["run", "--bias", "mn"], "'mn' is not a part of bhnm"),
        (["run", "--model", "GPT-5"], "'GPT-5' is not one of 'Llama-3-8B'"),
        (["run", "--model", "MiniLM", "--heads", "3"], "--heads: the heads are the model's"),
        (["run", "--peers", "nobody"], "'nobody' is no peer: choose from all, none, torch-cudnn, torch-flash"),
        (["run", "--format", "xml"], "'xml' is not one of 'table'"),
        (["list", "nothing"], "'nothing' is not one of 'suites'"),
        (["cache", "warmup", "--arch", "sm_75"], "'sm_75' is not one of 'sm_80'"),
        (["cache", "burn"], "No such command 'burn'"),
        (["inspect", "rope", "--arch", "sm_75"], "'sm_75' is not one of 'sm_80'"),
        (["inspect", "rope", "--clock", "0"], "0.0 is not in the range"),
        (["inspect", "rope", "--sms", "0"], "0 is not in the range"),
    ],
)
def test_usage_errors(run: Run, arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.skipif(machine.has_gpu(), reason="a GPU answers here")
def test_cuda_without_a_gpu(run: Run) -> None:
    result = run("run", "--executor", "cuda")
    assert is_one_line_error(result)
    assert "no GPU answers" in result.stderr


@pytest.mark.parametrize(
    ("name", "value", "arguments"),
    [
        ("CUATTN_HOST_ARCH", "sm_70", ("info", "--json")),
        ("CUATTN_HOST_THREADS", "many", ("info",)),
        ("CUATTN_HOST_ARCH", "sm_70", ("cache", "warmup")),
    ],
)
def test_unknown_environment_values(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str, value: str, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setenv(name, value)
    result = run(*arguments)
    assert is_one_line_error(result), result.output
    assert f"{name}='{value}' is not allowed" in result.stderr


def test_an_error_in_a_suite_is_no_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUATTN_HOST_ARCH", "sm_70")
    result = run("run", "attention", *TINY)
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert "CUATTN_HOST_ARCH" in result.output


def test_a_cache_that_is_no_directory(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.touch()
    monkeypatch.setenv("CUATTN_CACHE_DIR", str(path))
    for arguments in (("cache", "ls"), ("cache", "clear", "--yes"), ("cache", "warmup", "--arch", "sm_80")):
        result = run(*arguments)
        assert is_one_line_error(result), result.output
        assert "is not a directory" in result.stderr
    assert "not usable" in run("info").stdout


def test_warnings_are_lines_of_their_own(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    from cuattn.errors import CacheWarning

    monkeypatch.setattr(
        "cli.cache.store.ls", lambda: warnings.warn("a damaged entry", CacheWarning, stacklevel=1) or []
    )
    result = run("cache", "ls", "--json")
    assert result.stdout.strip() == "[]"
    assert result.stderr.strip() == "Warning: a damaged entry"


@pytest.mark.parametrize("module", ["cli", "cuattn"])
def test_from_a_checkout(module: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", module, "list", "suites"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "one-minute" in result.stdout or "under a minute" in result.stdout
