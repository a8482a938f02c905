"""The example of needles in a long context: what each kind of attention finds, on a shorter one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from examples import long_context
from examples.long_context import KINDS, NEEDLES, Task, task


def right(name: str, given: Task) -> list[bool]:
    out = KINDS[name](given.q, given.k, given.v)
    return (out[0, -NEEDLES:, 0].astype(np.float32).argmax(axis=1) == given.symbols).tolist()


def test_full_attention_finds_every_needle() -> None:
    given = task(1500)
    assert given.q.shape == (1, 1500, 1, 64) and (np.diff(given.places) > 100).all()
    assert all(right("full", given))


def test_a_window_finds_what_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_context, "WINDOW", 700)
    given = task(1500)
    near = (1500 - NEEDLES + np.arange(NEEDLES)) - given.places < 700
    assert 0 < near.sum() < NEEDLES
    assert right(f"window {2048}", given) == near.tolist()


def test_turned_questions_are_answered_as_long_as_they_point_at_their_answers() -> None:
    assert all(right("full, turned", task(1500)))


def test_it_prints_a_line_for_each_kind(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    image = tmp_path / "needles.png"
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        long_context.main(["--tokens", "600"])
    else:
        long_context.main(["--tokens", "600", "--plot", str(image)])
        assert image.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert [line[:22].strip() for line in lines[3 : 3 + len(KINDS)]] == list(KINDS)
    assert lines[3].endswith(" ".join("+" * NEEDLES))
