"""The kernels move the bytes that the theory pages say, and the pages show what was counted."""

from __future__ import annotations

import pytest

from bench import traffic


@pytest.mark.parametrize("rows", [traffic.softmax_rows, traffic.attention_rows])
def test_counted_traffic_is_the_formula(rows) -> None:
    assert [row for row in rows() if row.counted != row.formula] == []


@pytest.mark.parametrize("band", traffic.WORK_BANDS.values(), ids=str)
def test_counted_tiles_are_the_formula(band) -> None:
    config, counted, _ = traffic.count_tiles(1024, band)
    assert counted == traffic.visited_tiles(config, 1024, band)


def test_the_theory_pages_are_up_to_date() -> None:
    for name, text in traffic.tables().items():
        page = traffic.PAGES[name].read_text(encoding="utf-8")
        assert traffic.with_table(page, name, text) == page, "run python -m bench.traffic --write"
