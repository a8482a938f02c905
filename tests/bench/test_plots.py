"""Pictures of made-up reports: what is drawn, what its axes say, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cli.main import main
from cuattn.benchmark import Record, Report, lengths, plots, seed
from cuattn.benchmark.plots import PlotError, Source
from cuattn.testing.cases import AttentionCase
from cuattn.testing.decode_cases import DecodeCase

pytest.importorskip("matplotlib")


def report(executor: str) -> Report:
    """Something for every kind of picture; the figures are made up."""
    speed = "tflop_per_s" if executor == "cuda" else "gflop_per_s"
    records = []
    if executor == "cuda":
        records.append(Record("ceilings", "copy", {"bandwidth_gb_per_s": 4000.0}, "copyto", executor))
        records.append(Record("ceilings", "matmul_8192_bfloat16", {"tflop_per_s": 700.0}, "matmul", executor))
    for provider in ("cuattn", "torch FLASH"):
        case = AttentionCase(1, 1024, 16, 128, causal=True)
        metrics = {"time_us": 50.0, speed: 400.0, "work_flops": case.flops, "work_bytes": case.num_bytes}
        records.append(Record("attention", case.name, metrics, provider, executor))
    for page_size in (0, 16):
        for context in (1024, 8192):
            decode = DecodeCase(2, context, 8, 2, 64, page_size=page_size)
            records.append(Record("decode", decode.name, {"time_us": 9.0, "least_bytes": 9000}, executor=executor))
    for case in seed.cases():
        metrics = {"flash_time_us": 1e3, "standard_time_us": 5e3, "saved_percent": 90.0}
        metrics |= {"flash_memory_bytes": 1 << 20, "standard_memory_bytes": case.seqlen_q << 14}
        records.append(Record("seed", case.name, metrics, executor=executor))
    for n in (256, 512, 1024):
        for index, kind in enumerate(lengths.KINDS):
            count = n * n if kind == "attention" else n * 300 * index
            metrics = {"warp_instructions": count, "global_read_bytes": count, "time_us": float(count)}
            records.append(Record("lengths", f"lengths_{kind}_n{n}_h1_d64_float16", metrics, executor=executor))
    counts = {"warp_instructions": 100, "mma": 30, "float": 20}
    records.append(Record("options", "option_plain", counts, executor=executor))
    return Report({}, tuple(records), "", 0.0)


def texts(figure: Any) -> str:
    """Everything that is written in a figure."""
    found = [figure.get_suptitle()]
    for axes in figure.axes:
        found += [axes.get_xlabel(), axes.get_ylabel(), *(text.get_text() for text in axes.texts)]
        found += axes.get_legend_handles_labels()[1] + [label.get_text() for label in axes.get_yticklabels()]
    return "\n".join(found)


@pytest.mark.parametrize("executor", ["host", "cuda"])
@pytest.mark.parametrize("kind", list(plots.KINDS))
def test_every_kind_says_where_it_was_measured(kind: str, executor: str) -> None:
    figure = plots.draw([Source("", report(executor))], kind)
    text = texts(figure)
    assert any(axes.lines or axes.patches for axes in figure.axes)
    if kind == "mix":
        return
    assert ("host executor" in text) == (executor == "host")
    assert ("on a GPU" in text) == (executor == "cuda")


def test_what_the_pictures_say() -> None:
    text = texts(plots.draw([Source("", report("cuda"))], "seed"))
    for words in ("published 48.6 %", "published 92 %", "published: past its memory", "torch MATH", "published"):
        assert words in text
    figure = plots.draw([Source("", report("host"))], "seed")
    assert "torch MATH" not in texts(figure)  # times of a GPU do not stand beside those of a CPU
    text = texts(plots.draw([Source("", report("host"))], "lengths"))
    assert "window of 256: less from N = 512" in text and "linear: less from N = 1,024" in text
    assert {"copyto", "matmul", "torch FLASH"} & set(
        texts(plots.draw([Source("", report("cuda"))], "bars")).split("\n")
    )
    both = [Source("before", report("host")), Source("after", report("host"))]
    assert "after torch FLASH" in texts(plots.draw(both, "bars"))


def test_crossings() -> None:
    base = {1: 1.0, 2: 4.0, 4: 16.0}
    assert plots._crossing({1: 2.0, 2: 3.0, 4: 5.0}, base) == 2
    assert plots._crossing({1: 0.5, 2: 5.0, 4: 5.0}, base) == 4
    assert plots._crossing({1: 2.0, 2: 5.0, 4: 16.0}, base) is None


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, gpu, empty = report("host"), report("cuda"), Report({}, (), "", 0.0)
    with pytest.raises(PlotError, match="do not belong on one axis"):
        plots.draw([Source("a", host), Source("b", gpu)], "bars")
    for kind in plots.KINDS:
        with pytest.raises(PlotError, match="report"):
            plots.draw([Source("", empty)], kind)
    with pytest.raises(PlotError, match="no picture of the suites"):
        plots.kind_for(empty)
    assert plots.kind_for(host) == "seed"
    with pytest.raises(PlotError, match=r"x\.pdf is no name of a picture"):
        plots.save(None, tmp_path / "x.pdf")
    figure = plots.draw([Source("", host)], "mix")
    with pytest.raises(PlotError, match="cannot write"):
        plots.save(figure, tmp_path / "no" / "x.png")
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlotError, match=r"pip install 'cuattn\[plot\]'"):
        plots.draw([Source("", host)], "mix")


@pytest.fixture
def run() -> Callable[..., Result]:
    return lambda *arguments: CliRunner().invoke(main, [str(word) for word in arguments])


def test_the_command(run: Callable[..., Result], tmp_path: Path) -> None:
    path, picture = tmp_path / "x.json", tmp_path / "x.png"
    report("host").write(path)
    result = run("plot", path, "-o", picture)
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert run("plot", path, path, "-o", tmp_path / "x.svg", "--kind", "mix").exit_code == 0
    assert "<svg" in (tmp_path / "x.svg").read_text()
    for arguments, words in (
        ((path, "-o", tmp_path / "x.gif"), "is no name of a picture"),
        ((path, "-o", tmp_path / "no" / "x.png"), "cannot write"),
    ):
        result = run("plot", *arguments)
        assert result.exit_code == 1 and words in result.stderr and "Traceback" not in result.output
    assert run("plot", path).exit_code == 2 and run("plot", "-o", picture).exit_code == 2


def test_a_run_draws_its_results(run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [record for record in report("host").records if record.suite == "seed"]
    monkeypatch.setattr("cli.run.run_steps", lambda steps, progress, on_record: [on_record(one) for one in records])
    picture = tmp_path / "x.svg"
    assert run("run", "seed", "--plot", picture).exit_code == 0
    assert "<svg" in picture.read_text()
    assert "is no name of a picture" in run("run", "seed", "--plot", tmp_path / "x.txt").stderr
    assert "is not a directory" in run("run", "seed", "--plot", tmp_path / "no" / "x.png").stderr
