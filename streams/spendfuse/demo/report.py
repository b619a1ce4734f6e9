"""What the weekend's trail says: read back from ClickHouse, nothing remembered by the demo itself."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from spendfuse.demo.plan import AGENTS, WEEKEND_NANOS_PER_S
from spendfuse.demo.stage import Total, Trail, whole
from spendfuse.engine.sentences import money

P50: Final = 50
P99: Final = 99
US_PER_MS: Final = 1_000


@dataclass(frozen=True, slots=True)
class WeekendReport:
    """The numbers of one weekend; money in nano-dollars, lags in microseconds of the machine's clock."""

    without_nanos: int
    spent_nanos: int
    caps_nanos: int
    overshoot_nanos: int
    overshoot_at_real_pace_nanos: int
    halt_lag_p50_us: int
    halt_lag_p99_us: int
    agents: int
    agents_stopped: int
    agents_acknowledged: int
    calls: int
    difference_nanos: int
    factor: int

    @property
    def overshoot_basis_points(self) -> int:
        """Return the overshoot in 1/10,000 of the caps that tripped."""
        return self.overshoot_nanos * 10_000 // self.caps_nanos if self.caps_nanos else 0

    def as_json(self) -> dict[str, int]:
        """Return the numbers as plain data."""
        return asdict(self) | {"overshoot_basis_points": self.overshoot_basis_points}


def percentile(values: Sequence[int], percent: int) -> int:
    """Return the nearest-rank percentile; 0 of nothing."""
    if not values:
        return 0
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def read_report(
    trail: Trail, *, without_nanos: int, emitted: dict[str, Total], stopped: int, factor: int
) -> WeekendReport:
    """Ask the trail for the weekend.

    `without_nanos` is the plan's cost, `emitted` what the agents say they sent (priced from the plan), `stopped` how
    many of them ended by their guard.
    """
    totals = trail.totals()
    spent = sum(total.cost_nanos for total in totals.values())
    over = [row for row in trail.rows("overshoot") if row["unit"] == "nano-USD"]
    lags = [
        whole(row["halt_lag_us"]) // factor
        for row in trail.rows("halts")
        if row["enforced_at"] is not None and row["halt_lag_us"] is not None
    ]
    acknowledged = {row["agent"] for row in trail.rows("halts") if row["enforced_at"] is not None}
    wrong = sum(
        abs(totals.get(agent, Total(0, (0, 0, 0, 0, 0), 0)).cost_nanos - total.cost_nanos)
        for agent, total in emitted.items()
    )
    return WeekendReport(
        without_nanos=without_nanos,
        spent_nanos=spent,
        caps_nanos=sum(whole(row["cap_amount"]) for row in over),
        overshoot_nanos=sum(whole(row["overshoot"]) for row in over),
        # At the weekend's pace each agent burns its share of $0.181 a second for as long as its stop took.
        overshoot_at_real_pace_nanos=sum(lags) * (WEEKEND_NANOS_PER_S // AGENTS) // 1_000_000,
        halt_lag_p50_us=percentile(lags, P50),
        halt_lag_p99_us=percentile(lags, P99),
        agents=len(emitted),
        agents_stopped=stopped,
        agents_acknowledged=len(acknowledged),
        calls=sum(total.calls for total in totals.values()),
        difference_nanos=wrong,
        factor=factor,
    )


def render_report(report: WeekendReport) -> RenderableType:
    """Return the report for a person."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(justify="right", style="bold")
    table.add_column(style="dim")

    def usd(nanos: int) -> str:
        return money(nanos, "USD")

    percent = f"{report.overshoot_basis_points / 100:.2f} %"
    table.add_row(
        "The weekend without a fuse", Text(usd(report.without_nanos), style="bold red"), "the same plan, priced"
    )
    table.add_row(
        "The weekend with spendfuse",
        Text(usd(report.spent_nanos), style="bold green"),
        f"{report.calls:,} calls charged",
    )
    table.add_row("Caps that tripped", usd(report.caps_nanos), "sum of the agents' caps")
    table.add_row(
        "Overshoot, measured",
        usd(report.overshoot_nanos),
        f"{percent} of the caps, with time running {report.factor:,} times as fast",
    )
    table.add_row(
        "Overshoot, at the real pace",
        usd(report.overshoot_at_real_pace_nanos),
        "computed: the measured lags at $0.181 a second, and no call in flight",
    )
    table.add_row(
        "Halt lag p50 / p99",
        f"{_ms(report.halt_lag_p50_us)} / {_ms(report.halt_lag_p99_us)}",
        "crossing usage emitted until the agent's guard stopped it",
    )
    table.add_row(
        "Agents stopped", f"{report.agents_stopped} of {report.agents}", f"{report.agents_acknowledged} acknowledged"
    )
    verdict = "exact" if report.difference_nanos == 0 else "WRONG"
    table.add_row(
        "Ledger against agents",
        f"{usd(report.difference_nanos)} {verdict}",
        "difference of what was emitted and what was charged",
    )
    return Panel(table, title="read back from ClickHouse", title_align="left", border_style="green", expand=False)


def _ms(us: int) -> str:
    return f"{us / US_PER_MS:.1f} ms"


def print_report(console: Console, report: WeekendReport) -> None:
    """Print the report."""
    console.print(Group(render_report(report)))
