"""The reports through the endpoint and the ordinary client, against sums that Python makes of the same entries."""

from __future__ import annotations

import asyncio
import csv
import hashlib
import io
import json
from collections import Counter, defaultdict
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from audit_samples import COUNTERS, START, ack_entry, charge, command_entry, correction, halt, message

pytest.importorskip("chdb", reason="the embedded ClickHouse needs the chdb package")
pytest.importorskip("clickhouse_connect")
pytest.importorskip("aiohttp")

from typer.testing import CliRunner

from spendfuse.audit import migrate, queries, reports, trail
from spendfuse.audit.batches import Collector, Message
from spendfuse.audit.database import Engine, open_embedded
from spendfuse.audit.endpoint import Endpoint
from spendfuse.audit.reports import Period, ReportError
from spendfuse.cli.app import app
from spendfuse.wire.control import Cause

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

    from spendfuse.wire.ledger import LedgerEntry

MARCH = Period.month("2025-03")
CENTRES = ("eng-1", "=HYPERLINK(A1)", "")

AGAIN = {3: 1, 40: 2, 41: 1}
"""Calls that come again, so many times: from another partition, after they were forgotten."""


def entries() -> list[LedgerEntry]:
    """Two weeks over a month's end, two currencies and workspaces, cost centres of any kind, and duplicates."""
    made = []
    for nth in range(600):
        centre = CENTRES[nth % 3]
        entry = charge(
            nth,
            ts=START + timedelta(minutes=nth * 33),
            kind="duplicate" if nth % 17 == 0 else "charge",
            workspace="acme" if nth % 11 else "globex",
            workflow=None if nth % 4 else "weekly-report",
            tags={"cost_center": centre} if centre else {},
        )
        if nth % 13 == 0:
            assert entry.charge is not None
            entry = entry.model_copy(update={"charge": entry.charge.model_copy(update={"currency": "EUR"})})
        made.append(entry)
    order = halt(1, cause=Cause(usage_id="call-0-8", ts=START, partition=0, offset=2))
    other = halt(
        2, scope="agent:acme/research/agent-9", cause=Cause(usage_id="elsewhere", ts=START, partition=0, offset=2)
    )
    obeyed = halt(3, scope="team:acme/research", cause=None)
    at = START + timedelta(minutes=11)
    return [
        *made,
        command_entry(order, 0),
        command_entry(other, 1),
        command_entry(obeyed, 2),
        command_entry(halt(4, scope="run:acme/run-1", action="warn", cause=None), 3, "decision"),
        ack_entry(obeyed, 0, "received", at),
        ack_entry(obeyed, 1, "enforced", at + timedelta(seconds=2), run="run-1"),
        *called_again(),
    ]


def called_again() -> list[LedgerEntry]:
    """Calls that were charged again, beside duplicates that were caught and the same ids of another agent."""
    own: dict[str, Any] = {"workspace": "again", "run": "run-again", "root_run": "run-again"}
    first = [charge(nth, partition=7, id=f"call-{nth}", **own) for nth in range(80)]
    again = [
        charge(nth, partition=8 + turn, id=f"call-{nth}", **own)
        for nth, times in AGAIN.items()
        for turn in range(times)
    ]
    return [
        *first,
        *again,
        charge(7, partition=12, id="call-7", **own, agent="agent-of-the-same-id"),
        charge(9, partition=12, id="call-9", **own, kind="duplicate"),
    ]


ENTRIES = entries()
CHARGES = [entry for entry in ENTRIES if entry.kind == "charge"]
CORRECTIONS = [
    # Of some charges less, of others more, of one twice, and of one far more than was charged.
    *(correction(entry, 1_000 + nth, tokens=nth % 7 * 2 - 5) for nth, entry in enumerate(CHARGES[::23])),
    correction(CHARGES[23], 2_000, tokens=-3, id="fix-again"),
    correction(CHARGES[46], 2_001, tokens=-1_000_000, cost_nanos=-(10**12)),
]
ENTRIES += CORRECTIONS


def of(period: Period, workspace: str = "") -> Iterator[tuple[Any, Any]]:
    for entry in CHARGES:
        usage, priced = entry.usage, entry.charge
        assert usage is not None
        assert priced is not None
        if period.since <= usage.ts.date() < period.until and workspace in ("", usage.workspace):
            yield usage, priced


def money(period: Period, workspace: str = "") -> Iterator[tuple[Any, Any]]:
    """The charges of a period, and the corrections of its charges: what they add to counters and money."""
    yield from of(period, workspace)
    for entry in CORRECTIONS:
        fix = entry.correction
        assert fix is not None
        if period.since <= fix.ts.date() < period.until and workspace in ("", fix.workspace):
            yield fix, fix


def summed(pairs: Iterable[tuple[Any, Any]], key: Callable[[Any, Any], Any]) -> dict[Any, tuple[int, ...]]:
    """Key -> calls (a correction is none), the six counters, nano-units."""
    sums: defaultdict[Any, list[int]] = defaultdict(lambda: [0] * 8)
    for usage, priced in pairs:
        for place, value in enumerate(
            [usage is not priced, *(getattr(usage.tokens, name) for name in COUNTERS), priced.cost_nanos]
        ):
            sums[key(usage, priced)][place] += value
    return {each: tuple(values) for each, values in sums.items()}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    opened = Engine(tmp_path_factory.mktemp("reports") / "clickhouse", "trail")
    database = open_embedded(opened)
    try:
        migrate.apply(database)
        collector = Collector("spendfuse.ledger.v1", 0, 1, 1, {}, 5_000)
        assert collector.add(Message(0, 0, message(ENTRIES)))
        trail.store(database, collector.seal())
        yield opened
    finally:
        database.close()


@pytest_asyncio.fixture
async def ask(engine: Engine) -> AsyncIterator[Any]:
    """Run a function of a read client in a thread, as a report's process would."""
    endpoint = Endpoint(engine, "token", 0)
    address = await endpoint.start()
    address.write(engine.directory)

    async def run(function: Callable[[Any], Any]) -> Any:
        def call() -> Any:
            with queries.connect_to(address) as client:
                return function(client)

        return await asyncio.to_thread(call)

    try:
        yield run
    finally:
        await endpoint.stop()


KEYS: dict[str, tuple[tuple[str, ...], Callable[[Any, Any], Any]]] = {
    "wallet": (("day", "workspace", "currency"), lambda u, c: (u.ts.date(), u.workspace, c.currency)),
    "team": (("workspace", "team", "currency"), lambda u, c: (u.workspace, u.team, c.currency)),
    "agent": (("workspace", "team", "agent", "currency"), lambda u, c: (u.workspace, u.team, u.agent, c.currency)),
    "workflow": (("workspace", "workflow", "currency"), lambda u, c: (u.workspace, u.workflow or "", c.currency)),
    "models": (
        ("workspace", "provider", "model", "currency"),
        lambda u, c: (u.workspace, u.provider, u.model, c.currency),
    ),
}


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize(
    ("period", "workspace"),
    [(MARCH, ""), (MARCH, "globex"), (Period.days("2025-03-30", "2025-04-02"), "acme"), (Period.month("2025-02"), "")],
)
async def test_a_report_s_rows_are_the_sums_of_the_entries(ask: Any, name: str, period: Period, workspace: str) -> None:
    given = {"team": ""} if name == "agent" else {}
    report = await ask(lambda client: reports.read(client, name, period, workspace, **given))
    names, key = KEYS[name]
    values = ("calls", *(f"{counter}_tokens" for counter in COUNTERS), "cost_nanos")
    got = {tuple(row[each] for each in names): tuple(row[each] for each in values) for row in report.rows}
    assert got == summed(money(period, workspace), key)
    assert len(got) == len(report.rows)
    for row in report.rows:
        every = sum(row[f"{counter}_tokens"] for counter in COUNTERS[:4])
        assert row["cache_hit_bp"] == 10_000 * row["cache_read_tokens"] // every
    costs = [(row["workspace"], row["currency"], -row["cost_nanos"]) for row in report.rows]
    if name != "wallet":
        assert costs == sorted(costs)


async def test_an_agent_report_of_one_team_is_of_that_team(ask: Any) -> None:
    report = await ask(lambda client: reports.read(client, "agent", MARCH, "acme", team="support"))
    assert {row["team"] for row in report.rows} == {"support"}


@pytest.mark.parametrize("workspace", ["", "acme"])
async def test_a_chargeback_adds_up_to_the_ledger_exactly_and_its_cents_to_the_rounded_total(
    ask: Any, workspace: str
) -> None:
    charged = await ask(lambda client: reports.read_chargeback(client, MARCH, workspace))
    expected = summed(
        money(MARCH, workspace), lambda u, c: (u.workspace, u.team, u.tags.get("cost_center", ""), c.currency)
    )
    got = {
        (row["workspace"], row["team"], row["cost_center"], row["currency"]): (row["calls"], row["cost_nanos"])
        for row in charged.report.rows
    }
    assert got == {key: (values[0], values[-1]) for key, values in expected.items()}
    ledger = Counter[str]()
    for usage, priced in money(MARCH, workspace):
        ledger[priced.currency] += priced.cost_nanos * bool(usage)
    lines = list(csv.DictReader(io.StringIO(charged.csv.decode(), newline="")))
    for currency, nanos in ledger.items():
        rows = [line for line in lines if line["currency"] == currency]
        total = Decimal(nanos).scaleb(-9)
        assert sum(Decimal(row["cost"]) for row in rows) == total
        assert sum(int(row["cost_nanos"]) for row in rows) == nanos
        assert sum(Decimal(row["amount"]) for row in rows) == total.quantize(Decimal("0.01"), "ROUND_HALF_UP")
        assert all(abs(Decimal(row["amount"]) - Decimal(row["cost"])) < Decimal("0.01") for row in rows)
    assert {line["cost_center"] for line in lines} == {"eng-1", "'=HYPERLINK(A1)", ""}
    assert charged.csv.count(b"\r\n") == len(lines) + 1
    control = charged.control(datetime(2025, 4, 1, tzinfo=UTC))
    assert control["sha256"] == hashlib.sha256(charged.csv).hexdigest()
    assert (control["rows"], control["period_is_over"]) == (len(lines), True)
    assert {each["currency"]: each["cost_nanos"] for each in control["totals"]} == ledger
    assert not charged.control(datetime(2025, 3, 31, 23, 59, tzinfo=UTC))["period_is_over"]
    again = await ask(lambda client: reports.read_chargeback(client, MARCH, workspace))
    assert again.csv == charged.csv


async def test_a_chargeback_that_its_control_contradicts_is_not_given(
    ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = reports.load
    monkeypatch.setattr(
        reports, "load", lambda name: load(name).replace("sum(d.cost_nanos)", "sum(d.cost_nanos) + 1")
        if name == "report_control" else load(name),
    )  # fmt: skip
    pauses: list[float] = []
    with pytest.raises(ReportError, match="do not agree on EUR, USD"):
        await ask(lambda client: reports.read_chargeback(client, MARCH, sleep=pauses.append))
    assert len(pauses) == reports.CONTROL_TRIES - 1


async def test_the_chargeback_is_answered_from_the_projection(ask: Any) -> None:
    text = queries.load("report_chargeback")
    given = {"workspace": "acme", "since": MARCH.since, "until": MARCH.until}
    rows = await ask(lambda client: client.query(f"EXPLAIN {text}", parameters=given).result_rows)
    assert any("ReadFromMergeTree (by_cost_center)" in row[0] for row in rows)


async def test_a_run_s_record_has_its_tokens_models_money_context_and_commands(ask: Any) -> None:
    record = await ask(lambda client: reports.read_run(client, "run-1", "acme"))
    own = [(u, c) for u, c in of(Period.days("2025-01-01", "2025-12-31"), "acme") if u.run == "run-1"]
    assert record.calls == len(own) > 10
    got = {
        (row["model"], row["currency"]): tuple(row[each] for each in ("input_tokens", "cost_nanos"))
        for row in record.models.rows
    }
    whole = [(u, c) for u, c in money(Period.days("2025-01-01", "2025-12-31"), "acme") if u.run == "run-1"]
    assert len(whole) > len(own)
    expected = summed(whole, lambda u, c: (u.model, c.currency))
    assert got == {key: (values[1], values[-1]) for key, values in expected.items()}
    contexts = [u.tokens.total - u.tokens.output for u, _ in sorted(own, key=lambda pair: pair[0].ts)]
    assert [row["context_tokens"] for row in record.turns.rows] == contexts
    assert record.context_max == max(contexts)
    reads = sum(u.tokens.cache_read for u, _ in own)
    assert record.cache_hit_bp == 10_000 * reads // sum(contexts)
    assert record.agents == sorted({f"{u.team}/{u.agent}" for u, _ in own})
    found = [(row["action"], row["scope"], row["decided_only"]) for row in record.commands.rows]
    assert found == [
        ("halt", "agent:acme/research/agent-1", 0),
        ("warn", "run:acme/run-1", 1),
        ("halt", "team:acme/research", 0),
    ]
    obeyed = next(row for row in record.commands.rows if row["scope"].startswith("team:"))
    assert obeyed["enforced_at"] == (START + timedelta(minutes=11, seconds=2)).replace(tzinfo=None)
    data = json.loads(json.dumps(record.as_data()))
    assert data["cost"] == {
        currency: f"{sum(c.cost_nanos for _, c in whole if c.currency == currency) / Decimal(10**9):.9f}"
        for currency in {c.currency for _, c in own}
    }


async def test_a_root_run_is_its_whole_tree_and_an_unknown_or_shared_one_is_a_sentence(ask: Any) -> None:
    record = await ask(lambda client: reports.read_run(client, "run-root", "acme"))
    assert record.calls == sum(1 for _ in of(Period.days("2025-01-01", "2025-12-31"), "acme"))
    with pytest.raises(ReportError, match="'nobody'"):
        await ask(lambda client: reports.read_run(client, "nobody"))
    with pytest.raises(ReportError, match=r"acme, globex.*--workspace"):
        await ask(lambda client: reports.read_run(client, "run-root"))
    with pytest.raises(ReportError, match="DROP TABLE"):
        await ask(lambda client: reports.read_run(client, "x' OR 1=1; DROP TABLE usage_events --"))


async def test_the_command_line_shows_every_report_as_table_json_and_csv(
    ask: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("SPENDFUSE_CHDB_DIR", str(engine.directory))
    monkeypatch.delenv("SPENDFUSE_WORKSPACE", raising=False)
    monkeypatch.chdir(tmp_path)

    async def run(*words: str) -> Any:
        result = await asyncio.to_thread(CliRunner().invoke, app, ["report", *words])
        assert result.exit_code == 0, result.stderr
        return result

    for name in KEYS:
        shown = (await run(name, "--month", "2025-03", "--workspace", "acme")).stdout
        total = sum(c.cost_nanos for _, c in money(MARCH, "acme") if c.currency == "USD")
        assert f"USD {Decimal(total) / 10**9:,.2f}  2025-03-01 to 2025-03-31" in shown
        said = json.loads((await run(name, "--from", "2025-03-01", "--to", "2025-03-31", "--json")).stdout)
        assert sum(row["cost_nanos"] for row in said["rows"]) == sum(c.cost_nanos for _, c in money(MARCH))
        lines = list(csv.DictReader(io.StringIO((await run(name, "--month", "2025-03", "--csv")).stdout, newline="")))
        assert sum(Decimal(line["cost"]) for line in lines) == Decimal(said_total(said)).scaleb(-9)
    shown = (await run("run", "run-1", "--workspace", "acme")).stdout
    assert "run:acme/run-1" in shown
    assert "longest context" in shown
    assert json.loads((await run("run", "run-1", "--workspace", "acme", "--json")).stdout)["commands"]
    await run("chargeback", "--month", "2025-03", "--out", "march.csv")
    control = json.loads((tmp_path / "march.csv.control.json").read_text())
    assert control["sha256"] == hashlib.sha256((tmp_path / "march.csv").read_bytes()).hexdigest()
    assert "nothing was charged" in (await run("team", "--month", "2025-01")).stderr
    for words, says in (
        (["team", "--month", "x"], "such as 2026-11"),
        (["team", "--month", "2025-03", "--from", "2025-03-01"], "choose one"),
        (["team", "--to", "2025-03-01"], "--from"),
        (["team", "--csv", "--json"], "choose one"),
    ):
        result = await asyncio.to_thread(CliRunner().invoke, app, ["report", *words])
        assert (result.exit_code, says in result.stderr) == (2, True), result.stderr


def said_total(said: dict[str, Any]) -> int:
    return sum(row["cost_nanos"] for row in said["rows"])


@pytest.mark.parametrize("per_shard", [4_000_000, 100, 7])
async def test_calls_that_were_charged_again_are_found_with_what_they_cost(
    ask: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, per_shard: int
) -> None:
    monkeypatch.setenv("SPENDFUSE_CHDB_DIR", str(engine.directory))
    monkeypatch.delenv("SPENDFUSE_WORKSPACE", raising=False)
    monkeypatch.setattr(reports, "CALLS_PER_SHARD", per_shard)
    monkeypatch.chdir(tmp_path)
    assert ask is not None, "the endpoint is up"

    async def run(*words: str) -> Any:
        return await asyncio.to_thread(CliRunner().invoke, app, ["audit", "duplicates", *words])

    found = await run("--month", "2025-03", "--json")
    assert found.exit_code == 1, found.stderr
    said = json.loads(found.stdout)
    price = {nth: nth * 1_000_003 + 7 for nth in AGAIN}
    assert {(row["workspace"], row["usage_id"], row["charges"], row["cost_nanos"]) for row in said["rows"]} == {
        ("again", f"call-{nth}", 1 + times, times * price[nth]) for nth, times in AGAIN.items()
    }
    assert said["cost_nanos"] == {"USD": sum(times * price[nth] for nth, times in AGAIN.items())}
    for none in (await run("--month", "2025-02"), await run("--month", "2025-03", "--workspace", "acme")):
        assert (none.exit_code, none.stdout.endswith("was charged twice\n")) == (0, True)


def test_a_period_names_its_last_day() -> None:
    assert MARCH.last == date(2025, 3, 31)
