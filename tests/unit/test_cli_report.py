"""How a report looks: bars on a terminal, plain text beside it, and nothing from outside that steers it."""

from __future__ import annotations

import io
from datetime import date, datetime
from typing import Any

import pytest
from rich.console import Console

pytest.importorskip("clickhouse_connect")

from spendfuse.audit.reports import Period, Report, RunRecord
from spendfuse.cli import console, report

PERIOD = Period(date(2026, 11, 1), date(2026, 12, 1))


def row(team: str, nanos: int, currency: str = "USD") -> dict[str, Any]:
    counters = ("calls", "late_calls", "input_tokens", "cache_read_tokens", "cache_write_5m_tokens",
                "cache_write_1h_tokens", "output_tokens", "reasoning_tokens")  # fmt: skip
    return {
        "workspace": "acme", "team": team, "currency": currency, "cost_nanos": nanos, "cache_hit_bp": 8_756,
        **dict.fromkeys(counters, 1_234),
    }  # fmt: skip


TEAMS = Report("team", (row("research", 3_000_000_000), row("sup\x1b[2Jport", 1_000_000_000), row("x", 5, "EUR")))


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    written = io.StringIO()
    shown = Console(file=written, force_terminal=True, width=160, color_system=None, highlight=False, markup=False)
    monkeypatch.setattr(console, "out", lambda: shown)
    return written


def test_on_a_terminal_a_bar_is_full_at_the_largest_of_its_currency(terminal: io.StringIO) -> None:
    report._print_report(TEAMS, PERIOD)
    text = terminal.getvalue()
    bars = [line.count("━") for line in text.splitlines() if "acme" in line]
    assert bars == [report.BAR_CELLS, report.BAR_CELLS // 3, report.BAR_CELLS]
    assert "75.0 %" in text
    assert "USD 4.00  2026-11-01 to 2026-11-30 (UTC), 3 rows" in text
    assert "EUR 0.000000005" in text
    assert "\x1b[2J" not in text


def test_without_a_terminal_there_are_no_bars_and_every_row_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    report._print_report(TEAMS, PERIOD)
    text = capsys.readouterr().out
    assert "━" not in text
    assert [line.split()[0] for line in text.splitlines()] == ["workspace", "acme", "acme", "acme", "EUR", "USD"]
    assert "\x1b" not in text


@pytest.mark.parametrize(("calls", "lines"), [(1, 1), (20, 20), (21, 11), (1_000, 20)])
def test_a_run_s_context_is_drawn_in_a_bounded_number_of_stretches(calls: int, lines: int) -> None:
    turns = tuple({"context_tokens": nth + 1} for nth in range(calls))
    at = datetime(2026, 11, 23)  # noqa: DTZ001 - as ClickHouse's client gives it
    model = {**row("x", 1), "agents": ["x/y"], "context_max": calls, "first_at": at, "last_at": at}
    record = RunRecord("r", "acme", Report("run", (model,)), Report("turns", turns), Report("commands", ()))
    rows = report._context_rows(record)
    assert len(rows) == lines
    assert rows[-1][1] == f"{calls:,}"
    assert str(rows[-1][0]).endswith(str(calls))
