"""A real trace replayed through the same path, with caps that trip in the middle.

The replay emits every call of the file whatever the fuses say: it shows where they would have stopped each agent, and
what that would have saved, while the sums of the trail stay those of the file.
"""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from rich.console import Console
from rich.table import Table

from spendfuse.adapters import price_book_file
from spendfuse.adapters.table import RowError, read_table
from spendfuse.adapters.table_mapping import Mapping
from spendfuse.client.clock import ScaledClock
from spendfuse.client.meter import Meter
from spendfuse.demo.live import LiveView
from spendfuse.demo.stage import (
    DEMO_ENV,
    DemoError,
    Total,
    Trail,
    apply_budgets,
    end_if_interrupted,
    scaled_clock,
    whole,
)
from spendfuse.embedded.stack import EmbeddedStack
from spendfuse.engine.prices import PriceBook
from spendfuse.engine.sentences import money
from spendfuse.engine.windows import SECOND_US
from spendfuse.settings import IdentitySettings, MeterSettings
from spendfuse.wire.base import from_us, to_us
from spendfuse.wire.budget import Budget, Cap, WindowSpec
from spendfuse.wire.usage import Usage

SPAN_S_DEFAULT: Final = 20
TEAMS_MAX: Final = 100
ROWS_MAX: Final = 5_000_000
CENT_NANOS: Final = 10_000_000
BUFFER_MAX: Final = 100_000
FLUSH_TIMEOUT_S: Final = 60.0
LEAD_S: Final = 8.0
STEP_S: Final = 0.1
ROLLING_S: Final = 86_400
GRACE_S: Final = 7 * 86_400
FAULTS_SHOWN: Final = 5


@dataclass(slots=True)
class TraceFile:
    """A trace read once: its bounds in event time (us), each agent's totals by its own rows, and its bad rows."""

    first_us: int = 0
    last_us: int = 0
    rows: int = 0
    totals: dict[str, Total] = field(default_factory=dict)
    teams: dict[tuple[str, str], None] = field(default_factory=dict)
    faults: list[RowError] = field(default_factory=list)
    faults_total: int = 0


class TraceReport(NamedTuple):
    """What the trail says of a replay; money in nano-dollars."""

    rows: int
    refused_rows: int
    agents: int
    tripped: int
    spent_nanos: int
    after_trip_nanos: int
    difference_tokens: int
    difference_nanos: int
    table: list[dict[str, object]]

    def as_json(self) -> dict[str, object]:
        """Return the report as plain data."""
        return self._asdict()


def survey(path: Path, mapping: Mapping) -> TraceFile:
    """Read a trace once, for its bounds, its teams and its sums.

    Raises `DemoError` for an empty trace, one of more than one workspace, or one beyond the bounds.
    """
    book = PriceBook.compile(price_book_file.shipped())
    found = TraceFile()
    for usage in _usages(path, mapping, found):
        ts_us = to_us(usage.ts)
        found.first_us = min(found.first_us or ts_us, ts_us)
        found.last_us = max(found.last_us, ts_us)
        found.rows += 1
        found.teams[(usage.workspace, usage.team)] = None
        known = found.totals.get(usage.agent, Total(0, (0, 0, 0, 0, 0), 0))
        each = _counters(usage)
        a, b, c, d, e = (old + new for old, new in zip(known.tokens, each, strict=True))
        cost = book.charge(usage).cost_nanos
        found.totals[usage.agent] = Total(known.calls + 1, (a, b, c, d, e), known.cost_nanos + cost)
        if found.rows > ROWS_MAX or len(found.teams) > TEAMS_MAX:
            raise DemoError(f"{path.name} has more than {ROWS_MAX:,} rows or {TEAMS_MAX} teams: cut it")
    if not found.rows:
        raise DemoError(f"{path.name} has no row that can be read; the first faults: {found.faults[:FAULTS_SHOWN]}")
    if len({workspace for workspace, _ in found.teams}) > 1:
        raise DemoError(f"{path.name} has several workspaces; map one of them to a literal")
    return found


def _usages(path: Path, mapping: Mapping, found: TraceFile) -> Iterator[Usage]:
    def on_error(fault: RowError) -> None:
        found.faults_total += 1
        if len(found.faults) < FAULTS_SHOWN:
            found.faults.append(fault)

    yield from read_table(path, mapping, on_error=on_error)


def _counters(usage: Usage) -> tuple[int, int, int, int, int]:
    tokens = usage.tokens
    return tokens.input, tokens.cache_read, tokens.cache_write_5m, tokens.cache_write_1h, tokens.output


def run_trace(
    console: Console,
    *,
    directory: Path,
    path: Path,
    mapping: Mapping,
    span_s: int = SPAN_S_DEFAULT,
    show: bool = True,
) -> TraceReport:
    """Replay a trace in about `span_s` seconds and return what its trail says; nothing is left running.

    Raises `DemoError`, `TableError`, or what the embedded stack raises.
    """
    with console.status(f"reading {path.name}"):
        found = survey(path, mapping)
    factor = max(1, (found.last_us - found.first_us) // (span_s * SECOND_US))
    setting, clock = scaled_clock(found.first_us, factor, LEAD_S)
    with console.status("starting broker, worker and ClickHouse on this machine"):
        stack = EmbeddedStack(directory, clock=setting, extra_env=DEMO_ENV)
        stack.start()
    try:
        return asyncio.run(_replay(console, stack, path, mapping, found, clock, show=show))
    finally:
        stack.stop()


def trace_budgets(found: TraceFile) -> list[Budget]:
    """Return one budget for each team: every agent may spend half of what the mean agent spends in the trace."""
    mean = sum(total.cost_nanos for total in found.totals.values()) // len(found.totals)
    amount = max(CENT_NANOS, mean // 2 // CENT_NANOS * CENT_NANOS)
    cap = Cap(
        id="half",
        unit="nano-USD",
        amount=amount,
        window=WindowSpec(kind="rolling", rolling_s=ROLLING_S),
        warn=[5_000, 8_000],
    )
    return [
        Budget(id=f"trace-{nth}", version=1, scope=f"agent:{workspace}/{team}/*", caps=[cap], grace_s=GRACE_S)
        for nth, (workspace, team) in enumerate(found.teams)
    ]


async def _replay(
    console: Console,
    stack: EmbeddedStack,
    path: Path,
    mapping: Mapping,
    found: TraceFile,
    clock: ScaledClock,
    *,
    show: bool,
) -> TraceReport:
    await apply_budgets(stack.broker, trace_budgets(found), from_us(clock()))
    span_us = found.last_us - found.first_us
    async with LiveView(console, stack, clock, found.first_us, span_us, show=show) as view:
        replay = asyncio.create_task(asyncio.to_thread(_emit_all, stack, path, mapping, found, clock))
        while not replay.done():
            end_if_interrupted()
            if (failed := stack.failed()) is not None:
                raise DemoError(f"{failed} ended; its log is in {stack.run_directory}")
            view.refresh(0)
            await asyncio.sleep(STEP_S)
        await replay
        view.refresh(0)
    return await asyncio.to_thread(_read_back, console, stack, found)


def _emit_all(stack: EmbeddedStack, path: Path, mapping: Mapping, found: TraceFile, clock: ScaledClock) -> None:
    identity = IdentitySettings.from_env({}, workspace="trace", team="replay", agent="replayer")
    meter = Meter(identity, stack.broker, MeterSettings.from_env({}, meter_buffer_max=BUFFER_MAX), clock)
    with meter:
        for usage in _usages(path, mapping, TraceFile()):
            while (wait_us := to_us(usage.ts) - clock()) > 0:
                time.sleep(wait_us / clock.factor / SECOND_US)
            while meter.stats.buffered >= BUFFER_MAX // 2:
                time.sleep(STEP_S)
            meter.emit(usage)
        if not meter.flush(FLUSH_TIMEOUT_S) or meter.stats.dropped:
            raise DemoError(f"of {found.rows} calls {meter.stats.dropped} were dropped: the broker is too slow")


def _read_back(console: Console, stack: EmbeddedStack, found: TraceFile) -> TraceReport:
    workspace = next(iter(found.teams))[0]
    trail = Trail(stack, workspace)
    try:
        with console.status("waiting for the last row to reach ClickHouse"):
            trail.wait_for_calls(found.rows)
        return _report(trail, found)
    finally:
        trail.close()


def _report(trail: Trail, found: TraceFile) -> TraceReport:
    totals = trail.totals()
    context = {str(row["agent"]): row for row in trail.rows("context")}
    halts = {str(row["scope"]).rpartition("/")[2]: row for row in reversed(trail.rows("overshoot"))}
    nothing = Total(0, (0, 0, 0, 0, 0), 0)
    tokens_wrong = cost_wrong = 0
    table: list[dict[str, object]] = []
    for agent, wanted in sorted(found.totals.items()):
        have = totals.get(agent, nothing)
        tokens_wrong += sum(abs(a - b) for a, b in zip(have.tokens, wanted.tokens, strict=True))
        cost_wrong += abs(have.cost_nanos - wanted.cost_nanos)
        halt = halts.get(agent)
        table.append(
            {
                "agent": agent,
                "calls": have.calls,
                "tokens": sum(have.tokens),
                "cost_nanos": have.cost_nanos,
                "cap_nanos": whole(halt["cap_amount"]) if halt else None,
                "tripped_at": str(halt["crossed_at"]) if halt else None,
                "after_trip_nanos": have.cost_nanos - whole(halt["spend_at_halt"]) if halt else 0,
                "context_first": whole(context[agent]["context_first"]),
                "context_last": whole(context[agent]["context_last"]),
                "cache_hit_bp": whole(context[agent]["cache_hit_bp"]),
            }
        )
    return TraceReport(
        rows=found.rows,
        refused_rows=found.faults_total,
        agents=len(found.totals),
        tripped=len(halts),
        spent_nanos=sum(total.cost_nanos for total in totals.values()),
        after_trip_nanos=sum(whole(row["after_trip_nanos"]) for row in table),
        difference_tokens=tokens_wrong,
        difference_nanos=cost_wrong,
        table=table,
    )


def print_trace_report(console: Console, report: TraceReport, *, synthetic: str) -> None:
    """Print the replay's table; `synthetic` says which of its labels are ours."""
    table = Table(title="read back from ClickHouse", title_justify="left")
    for name in (
        "agent",
        "calls",
        "tokens",
        "cost",
        "tripped at (event time)",
        "after the trip",
        "context first → last",
        "cache hits",
    ):
        table.add_column(name, justify="left" if name == "agent" else "right")
    for row in report.table:
        table.add_row(
            str(row["agent"]),
            f"{whole(row['calls']):,}",
            f"{whole(row['tokens']):,}",
            money(whole(row["cost_nanos"]), "USD"),
            str(row["tripped_at"] or "-")[:19],
            money(whole(row["after_trip_nanos"]), "USD"),
            f"{whole(row['context_first']):,} → {whole(row['context_last']):,}",
            f"{whole(row['cache_hit_bp']) / 100:.1f} %",
        )
    console.print(table)
    console.print(
        f"{report.rows:,} calls ({report.refused_rows} rows refused), {money(report.spent_nanos, 'USD')}; "
        f"{report.tripped} of {report.agents} agents tripped, and {money(report.after_trip_nanos, 'USD')} came after. "
        f"Trail against file: {report.difference_tokens} tokens and {money(report.difference_nanos, 'USD')} apart."
    )
    if synthetic:
        console.print(f"Synthetic, ours and not the trace's: {synthetic}.", style="dim")


__all__ = ["Mapping", "TraceReport", "print_trace_report", "run_trace", "survey"]
