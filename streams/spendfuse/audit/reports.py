"""Reports over the trail: the queries `sql/queries/report_*`, typed, and as JSON or CSV.

Periods are whole days in UTC. Amounts stay integers of nano-units until they are text.
"""

import calendar
import hashlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Self

from spendfuse.audit.amounts import apportion, decimal_text, exact, minor_digits
from spendfuse.audit.queries import load
from spendfuse.wire.base import rfc3339

if TYPE_CHECKING:
    from clickhouse_connect.driver.client import Client

TURNS_MAX: Final = 10_000
"""Most calls of a run that are listed; its sums are over all of them."""
DUPLICATES_MAX: Final = 1_000
"""Most calls that are listed as charged again."""
CALLS_PER_SHARD: Final = 4_000_000
"""Call ids that one query holds in memory, some 200 MB; agents with more together are asked one after the other."""
CONTROL_TRIES: Final = 3
CONTROL_PAUSE_S: Final = 1.0
BASIS_POINTS: Final = 10_000
_MONTH: Final = re.compile(r"([0-9]{4})-(0[1-9]|1[0-2])")
# What a spreadsheet takes for a formula, and their full-width twins. Source: OWASP, CSV injection.
_FORMULA: Final = frozenset("=+-@\t\r\n＝＋－＠")  # noqa: RUF001 - the twins are meant

Row = dict[str, Any]
Kind = Literal["text", "count", "nanos", "share", "instant", "day", "list"]


class ReportError(Exception):
    """A report that cannot be given; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Period:
    """Whole days in UTC, `until` exclusive."""

    since: date
    until: date

    @classmethod
    def month(cls, text: str) -> Self:
        """Return the month `2026-11`; raises ReportError."""
        match = _MONTH.fullmatch(text)
        if match is None:
            raise ReportError(f"{text[:20]!r} is no month: write such as 2026-11")
        year, month = int(match[1]), int(match[2])
        if not 1970 <= year <= 2104:  # noqa: PLR2004 - what a ClickHouse DateTime holds
            raise ReportError(f"the trail has no year {year}: choose one between 1970 and 2104")
        first = date(year, month, 1)
        return cls(first, first + timedelta(days=calendar.monthrange(year, month)[1]))

    @classmethod
    def days(cls, first: str, last: str) -> Self:
        """Return the days from the first up to and including the last, each as `2026-11-23`; raises ReportError."""
        since, until = _day(first), _day(last) + timedelta(days=1)
        if since >= until:
            raise ReportError(f"the period ends on {last}, before it begins on {first}: exchange the two")
        return cls(since, until)

    @property
    def last(self) -> date:
        """Return the last day."""
        return self.until - timedelta(days=1)

    def is_over(self, now: datetime) -> bool:
        """Say whether the last day has ended."""
        return now >= _midnight(self.until)

    def __str__(self) -> str:
        return f"{self.since} to {self.last}"


def _day(text: str) -> date:
    try:
        found = date.fromisoformat(text)
    except ValueError:
        raise ReportError(f"{text[:20]!r} is no day: write such as 2026-11-23") from None
    if not 1970 <= found.year <= 2104:  # noqa: PLR2004 - what a ClickHouse DateTime holds
        raise ReportError(f"the trail has no year {found.year}: choose one between 1970 and 2104")
    return found


def _midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


class Column(NamedTuple):
    """A column of a report: its name in JSON and CSV, what it holds, and its heading in a terminal ('': not shown)."""

    name: str
    kind: Kind
    heading: str = ""


_SPEND: Final = (
    Column("calls", "count", "calls"),
    Column("late_calls", "count"),
    Column("input_tokens", "count", "input"),
    Column("cache_read_tokens", "count", "cache read"),
    Column("cache_write_5m_tokens", "count"),
    Column("cache_write_1h_tokens", "count"),
    Column("output_tokens", "count", "output"),
    Column("reasoning_tokens", "count"),
    Column("cache_hit_bp", "share", "cache hit"),
    Column("cost_nanos", "nanos", "cost"),
)
_CURRENCY: Final = Column("currency", "text")
_WORKSPACE: Final = Column("workspace", "text", "workspace")
_TEAM: Final = Column("team", "text", "team")
_AGENT: Final = Column("agent", "text", "agent")
_PROVIDER: Final = Column("provider", "text", "provider")
_MODEL: Final = Column("model", "text", "model")
COLUMNS: Final[Mapping[str, tuple[Column, ...]]] = {
    "wallet": (Column("day", "day", "day"), _WORKSPACE, _CURRENCY, *_SPEND),
    "team": (_WORKSPACE, _TEAM, _CURRENCY, *_SPEND),
    "agent": (_WORKSPACE, _TEAM, _AGENT, _CURRENCY, *_SPEND),
    "workflow": (_WORKSPACE, Column("workflow", "text", "workflow"), _CURRENCY, *_SPEND),
    "models": (_WORKSPACE, _PROVIDER, _MODEL, _CURRENCY, *_SPEND),
    "duplicates": (
        _WORKSPACE, _TEAM, _AGENT, Column("usage_id", "text", "call"), Column("at", "instant", "at"),
        Column("charged_again_at", "instant", "charged again at"), Column("charges", "count", "charges"), _CURRENCY,
        Column("cost_nanos", "nanos", "too much"),
    ),
    "chargeback": (
        Column("period", "text"), Column("posting_date", "day"), _WORKSPACE, _TEAM,
        Column("cost_center", "text", "cost centre"), _CURRENCY, Column("calls", "count", "calls"),
        Column("amount", "text"), Column("cost_nanos", "nanos", "cost"),
    ),
    "run": (
        _WORKSPACE, _PROVIDER, _MODEL, Column("tier", "text", "tier"),
        _CURRENCY, *_SPEND[:1], *_SPEND[2:],
    ),
    "turns": (
        Column("turn", "count", "turn"), Column("at", "instant", "at"), _WORKSPACE, _TEAM, _AGENT,
        Column("run", "text"), _MODEL, Column("context_tokens", "count", "context"),
        Column("cache_read_tokens", "count"), Column("output_tokens", "count", "output"), _CURRENCY,
        Column("cost_nanos", "nanos", "cost"),
    ),
    "commands": (
        Column("issued_at", "instant", "issued at"), Column("action", "text", "action"),
        Column("decided_only", "count"),
        Column("scope", "text", "scope"), Column("budget", "text"), Column("cap", "text"), Column("unit", "text"),
        Column("cap_amount", "count"), Column("spend", "count"), Column("enforced_at", "instant", "enforced at"),
        Column("issued_by", "text"), Column("message", "text", "message"),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Report:
    """Rows under columns, in the order of their query."""

    name: str
    rows: tuple[Row, ...]

    @property
    def columns(self) -> tuple[Column, ...]:
        """Return the columns."""
        return COLUMNS[self.name]

    def as_data(self) -> list[dict[str, Any]]:
        """Return plain data: amounts as exact integers, and again as decimal text (`cost`)."""
        return [_plain(row, self.columns) for row in self.rows]

    def as_csv(self) -> bytes:
        """Return RFC 4180 CSV in UTF-8: CRLF, a header, exact amounts, and no cell that is a formula."""
        header = [name for column in self.columns for name in _cell_names(column)]
        lines = [header, *([cell for column in self.columns for cell in _cells(row, column)] for row in self.rows)]
        return "".join(",".join(map(_quoted, line)) + "\r\n" for line in lines).encode()


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run did: its models, its calls in order (the first TURNS_MAX), and what was commanded to it."""

    run: str
    workspace: str
    models: Report
    turns: Report
    commands: Report

    @property
    def calls(self) -> int:
        """Return the number of calls."""
        return sum(int(row["calls"]) for row in self.models.rows)

    @property
    def agents(self) -> list[str]:
        """Return `team/agent` of those that took part."""
        return sorted({agent for row in self.models.rows for agent in row["agents"]})

    @property
    def context_max(self) -> int:
        """Return the longest context, in tokens."""
        return max(int(row["context_max"]) for row in self.models.rows)

    @property
    def cache_hit_bp(self) -> int:
        """Return the part of all input that a cache served, in 1/10,000."""
        names = ("input_tokens", "cache_read_tokens", "cache_write_5m_tokens", "cache_write_1h_tokens")
        every = sum(int(row[name]) for row in self.models.rows for name in names)
        return BASIS_POINTS * sum(int(row["cache_read_tokens"]) for row in self.models.rows) // every if every else 0

    def as_data(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "run": self.run,
            "workspace": self.workspace,
            "agents": self.agents,
            "workflows": sorted({name for row in self.models.rows for name in row["workflows"] if name}),
            "root_runs": sorted({name for row in self.models.rows for name in row["root_runs"]}),
            "first_at": _instant(min(row["first_at"] for row in self.models.rows)),
            "last_at": _instant(max(row["last_at"] for row in self.models.rows)),
            "calls": self.calls,
            "cache_hit_bp": self.cache_hit_bp,
            "context_max": self.context_max,
            "cost": {currency: exact(nanos) for currency, nanos in totals(self.models).items()},
            "models": self.models.as_data(),
            "turns": self.turns.as_data(),
            "commands": self.commands.as_data(),
        }


@dataclass(frozen=True, slots=True)
class Chargeback:
    """A period's charges by team and cost centre, whose amounts add up to the ledger's to the cent."""

    period: Period
    workspace: str
    report: Report
    csv: bytes

    def control(self, now: datetime) -> dict[str, Any]:
        """Return the control row: what the file must have and add up to, and whether the period is over."""
        amounts: dict[str, int] = {}
        for row in self.report.rows:
            amounts[row["currency"]] = amounts.get(row["currency"], 0) + int(row["amount"].replace(".", ""))
        return {
            "report": "chargeback",
            "from": self.period.since.isoformat(),
            "to": self.period.last.isoformat(),
            "workspace": self.workspace or "all",
            "rows": len(self.report.rows),
            "totals": [
                {
                    "currency": currency,
                    "amount": decimal_text(amounts[currency], minor_digits(currency)),
                    "cost": exact(nanos),
                    "cost_nanos": nanos,
                }
                for currency, nanos in totals(self.report).items()
            ],
            "rounding": "largest remainder, for each currency",
            "period_is_over": self.period.is_over(now),
            "what": "an internal charge from metered usage and the price book, not a provider's invoice",
            "sha256": hashlib.sha256(self.csv).hexdigest(),
        }


def read(client: "Client", name: str, period: Period, workspace: str = "", **parameters: str) -> Report:
    """Return wallet, team, agent (`team=`), workflow or models of a period; workspace '' is all of them."""
    return Report(
        name, tuple(_ask(client, f"report_{name}", {**_bounds(period), "workspace": workspace, **parameters}))
    )


def read_run(client: "Client", run: str, workspace: str = "") -> RunRecord:
    """Return a run's record; raises ReportError for one that is unknown, or of several workspaces."""
    given = {"workspace": workspace, "run": run}
    models = _ask(client, "report_run", given)
    owners = sorted({row["workspace"] for row in models})
    if not owners:
        where = f" of workspace {workspace}" if workspace else ""
        raise ReportError(f"no usage of a run {run!r}{where} is in the trail: see run ids in your emitters' logs")
    if len(owners) > 1:
        raise ReportError(f"run {run!r} is one of {', '.join(owners)}: say which with --workspace")
    given["workspace"] = owners[0]
    turns = _ask(client, "report_run_turns", {**given, "turns": TURNS_MAX})
    commands = _ask(client, "report_run_commands", given)
    return RunRecord(
        run, owners[0], Report("run", tuple(models)), Report("turns", tuple(turns)), Report("commands", tuple(commands))
    )


def read_chargeback(
    client: "Client", period: Period, workspace: str = "", sleep: Callable[[float], None] = time.sleep
) -> Chargeback:
    """Return a period's chargeback, checked against the daily rollup.

    Raises ReportError when the two stay apart: usage that arrives between the two questions is asked for again.
    """
    for nth in range(CONTROL_TRIES):
        if nth:
            sleep(CONTROL_PAUSE_S)
        rows = _ask(client, "report_chargeback", {"since": period.since, "until": period.until, "workspace": workspace})
        control = _ask(client, "report_control", {**_bounds(period), "workspace": workspace})
        charged = _sums(rows)
        wanted = {row["currency"]: (int(row["calls"]), int(row["cost_nanos"])) for row in control}
        if charged == wanted:
            return _chargeback(rows, period, workspace)
    apart = sorted(currency for currency in {*charged, *wanted} if charged.get(currency) != wanted.get(currency))
    raise ReportError(
        f"the charges of {period} and their daily rollup do not agree on {', '.join(apart)} ({charged} and {wanted}, "
        "calls and nano-units): wait until the audit has caught up; if it stays, see `spendfuse audit rebuild`"
    )


def read_duplicates(
    client: "Client",
    period: Period,
    workspace: str = "",
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Report:
    """Return the calls of a period that were charged more than once, the dearest first, at most DUPLICATES_MAX.

    A call is charged again under its own agent, so agents are looked through one after the other, as their rows lie:
    each row is read twice, whatever the period, and one query holds CALLS_PER_SHARD ids. `progress` is called with the
    calls done and all calls.
    """
    bounds = _bounds(period)
    agents = _ask(client, "duplicates_agents", {**bounds, "workspace": workspace})
    done, total = 0, sum(int(agent["calls"]) for agent in agents)
    found: list[Row] = []
    progress(done, total)
    for part, calls in _parts(agents):
        shards = max(-(-calls // CALLS_PER_SHARD), 1)
        for shard in range(shards):
            found += _ask(client, "duplicates", {**bounds, **part, "shard": shard, "shards": shards})
            found.sort(key=lambda row: (row["workspace"], row["currency"], -int(row["cost_nanos"]), row["usage_id"]))
            del found[DUPLICATES_MAX:]
        done += calls
        progress(done, total)
    return Report("duplicates", tuple(found))


def _parts(agents: Sequence[Row]) -> Iterator[tuple[dict[str, str], int]]:
    """Yield runs of neighbouring agents with at most CALLS_PER_SHARD calls together, or one agent, and their calls.

    A run is of whole teams of a workspace, or of agents of one team.
    """
    for workspace, teams in groupby(agents, key=lambda row: str(row["workspace"])):
        first, last, calls = "", "", 0
        for team, rows in groupby(teams, key=lambda row: str(row["team"])):
            members = list(rows)
            more = sum(int(row["calls"]) for row in members)
            if calls and calls + more > CALLS_PER_SHARD:
                yield _part(workspace, first, last), calls
                calls = 0
            if more > CALLS_PER_SHARD:
                yield from _of_team(workspace, team, members)
                continue
            first, last, calls = (first if calls else team), team, calls + more
        if calls:
            yield _part(workspace, first, last), calls


def _of_team(workspace: str, team: str, members: Sequence[Row]) -> Iterator[tuple[dict[str, str], int]]:
    first, last, calls = "", "", 0
    for row in members:
        agent, more = str(row["agent"]), int(row["calls"])
        if calls and calls + more > CALLS_PER_SHARD:
            yield _part(workspace, team, team, first, last), calls
            calls = 0
        first, last, calls = (first if calls else agent), agent, calls + more
    yield _part(workspace, team, team, first, last), calls


def _part(workspace: str, team_from: str, team_to: str, agent_from: str = "", agent_to: str = "") -> dict[str, str]:
    return {
        "workspace": workspace, "team_from": team_from, "team_to": team_to, "agent_from": agent_from,
        "agent_to": agent_to,
    }  # fmt: skip


def totals(report: Report) -> dict[str, int]:
    """Return nano-units by currency."""
    sums: dict[str, int] = {}
    for row in report.rows:
        sums[row["currency"]] = sums.get(row["currency"], 0) + int(row["cost_nanos"])
    return dict(sorted(sums.items()))


def _chargeback(rows: Sequence[Row], period: Period, workspace: str) -> Chargeback:
    amounts: dict[int, str] = {}
    for currency in {row["currency"] for row in rows}:
        places = [nth for nth, row in enumerate(rows) if row["currency"] == currency]
        digits = minor_digits(currency)
        for nth, minor in zip(places, apportion([int(rows[nth]["cost_nanos"]) for nth in places], digits), strict=True):
            amounts[nth] = decimal_text(minor, digits)
    fixed = {"period": str(period), "posting_date": period.last}
    report = Report("chargeback", tuple({**fixed, **row, "amount": amounts[nth]} for nth, row in enumerate(rows)))
    return Chargeback(period, workspace, report, report.as_csv())


def _sums(rows: Sequence[Row]) -> dict[str, tuple[int, int]]:
    sums: dict[str, tuple[int, int]] = {}
    for row in rows:
        calls, nanos = sums.get(row["currency"], (0, 0))
        sums[row["currency"]] = (calls + int(row["calls"]), nanos + int(row["cost_nanos"]))
    return sums


def _bounds(period: Period) -> dict[str, Any]:
    return {"since": _midnight(period.since), "until": _midnight(period.until)}


def _ask(client: "Client", name: str, parameters: Mapping[str, Any]) -> list[Row]:
    result = client.query(load(name), parameters=dict(parameters))
    return [dict(zip(result.column_names, row, strict=True)) for row in result.result_rows]


def _plain(row: Row, columns: Sequence[Column]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for column in columns:
        value = row[column.name]
        match column.kind:
            case "nanos":
                plain[column.name] = int(value)
                plain["cost"] = exact(int(value))
            case "count" | "share":
                plain[column.name] = int(value)
            case "instant":
                plain[column.name] = _instant(value)
            case "day":
                plain[column.name] = value.isoformat()
            case _:
                plain[column.name] = value
    return plain


def _instant(value: datetime | None) -> str | None:
    # ClickHouse's client gives UTC without saying so.
    return None if value is None else rfc3339(value.replace(tzinfo=UTC) if value.tzinfo is None else value)


def _cell_names(column: Column) -> tuple[str, ...]:
    return ("cost", column.name) if column.kind == "nanos" else (column.name,)


def _cells(row: Row, column: Column) -> tuple[str, ...]:
    value = _plain(row, (column,))[column.name]
    if column.kind == "nanos":
        return exact(value), str(value)
    text = "" if value is None else str(value)
    return (text if column.name == "amount" else safe_cell(text),) if column.kind == "text" else (text,)


def safe_cell(text: str) -> str:
    """Return a text cell that no spreadsheet takes for a formula: such a one gets an apostrophe before it."""
    return f"'{text}" if text[:1] in _FORMULA else text


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"' if any(char in cell for char in ',"\r\n') else cell
