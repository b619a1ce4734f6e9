"""What the audit's database does on this machine: writing, verifying, and every report and panel over many rows.

    python tests/bench/audit.py [--rows 10000000] [--keep DIR [--build-only]] [--stored 200000] [--times 20] \
      [--backlog 360000]

Embedded ClickHouse in a directory that is deleted afterwards, or kept with `--keep` and then not filled again. First
ledger messages go the whole way of the writer (read, sealed, inserted with all rollups) and are verified; then rows are
made by SQL, and each question is asked over HTTP by the ordinary client, as `spendfuse report` and Grafana do. p95 is
the nearest rank over `--times` answers; CPU is that of engine and client together, for one answer. Last, the audit
process itself is started over a ledger that has waited (an hour of 100 usages/s) in the embedded broker.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil
from aiokafka import AIOKafkaProducer

from spendfuse.audit import migrate, queries, trail
from spendfuse.audit.address import AuditNotRunningError
from spendfuse.audit.batches import Collector, Message
from spendfuse.audit.database import INSERT_SETTINGS, Database, Engine, open_embedded
from spendfuse.audit.endpoint import Endpoint
from spendfuse.audit.reports import Period, read, read_chargeback, read_duplicates, read_run
from spendfuse.audit.rows import Table
from spendfuse.audit.seal import GENESIS, LEAF_VERSION, HeaderFields, header_hash
from spendfuse.audit.verify import sql as verify_sql
from spendfuse.audit.verify import verify
from spendfuse.client.connection import producer_options
from spendfuse.embedded.processes import ChildProcess
from spendfuse.embedded.stack import EmbeddedStack
from spendfuse.embedded.tansu import BrokerUnavailableError
from spendfuse.grafana import ALL, expand, panels
from spendfuse.settings import AuditSettings
from spendfuse.wire.base import encode, to_us
from spendfuse.wire.control import Ack, Cause, Command, CommandWindow, Measure
from spendfuse.wire.ledger import Charge, LedgerBatch, LedgerEntry
from spendfuse.wire.topics import LEDGER
from spendfuse.wire.usage import Tokens, Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

END: Final = datetime(2026, 11, 1, tzinfo=UTC)
DAYS: Final = 61
CHUNK: Final = 1_000_000
BATCH: Final = 5_000
PER_MESSAGE: Final = 100
AGENTS: Final = 1_000
TURNS: Final = 400
ACTIVE: Final = 200
LANES: Final = 4
"""Ledger partitions of the rows that SQL makes; the writer's own are of partition 0."""
SEALED_AT_ONCE: Final = 100
MERGES_S_MAX: Final = 900.0
CATCH_UP_S_MAX: Final = 900.0
LOOK_S: Final = 0.1
SLOW_MS: Final = 300.0
"""As long as a report or a panel may take over 50 million rows, p95."""
MONTH: Final = Period.month("2026-10")
RUN: Final = "run-117"
HALTS: Final = 300

SETTINGS: Final = ", ".join(f"{name} = {value}" for name, value in INSERT_SETTINGS.items())
FIRST_US: Final = to_us(END - timedelta(days=DAYS))
FILL: Final = f"""
INSERT INTO spendfuse.usage_events (usage_id, occurred_at, recorded_at, kind, usage_kind, workspace, team, agent, run,
  root_run, parent_run, workflow, provider, model, tier, input_tokens, cache_read_tokens, cache_write_5m_tokens,
  cache_write_1h_tokens, output_tokens, reasoning_tokens, cost_nanos, currency, price_book, priced_by, tier_known,
  rates, late, source, tags, src_topic, src_partition, src_offset, src_index, ledger_partition, ledger_offset,
  batch_seq, batch_row)
SETTINGS insert_deduplication_token = '{{token}}', {SETTINGS}
WITH
  number % {ACTIVE} + intDiv(number, {ACTIVE * TURNS}) * {ACTIVE} AS run_number,
  intDiv(number, {ACTIVE}) % {TURNS} AS turn,
  run_number % {AGENTS} AS agent_number,
  cityHash64(number) AS dice,
  toUInt64(dice % 1500) AS fresh, toUInt64(turn * 350) AS cached, toUInt64(dice % 700) AS written,
  toUInt64(50 + dice % 900) AS out
SELECT lower(hex(SHA1(toString(number)))),
  fromUnixTimestamp64Micro(toInt64({FIRST_US} + intDiv(number * {DAYS * 86_400_000}, {{rows}}) * 1000)) AS happened_at,
  happened_at, 'charge', 'finished', 'acme', concat('team-', toString(agent_number % 20)),
  concat('agent-', toString(agent_number)), concat('run-', toString(run_number)) AS named, named, '',
  concat('workflow-', toString(agent_number % 30)), 'anthropic',
  ['claude-opus-4-6', 'claude-sonnet-4-6', 'claude-haiku-4-5', 'gpt-5', 'gemini-3'][1 + agent_number % 5], 'standard',
  fresh, cached, written, 0, out, intDiv(out, 3),
  toInt64(fresh * 3000 + cached * 300 + written * 3750 + out * 15000), 'USD', 'bench-1', 'book', 1,
  [3000000000, 300000000, 3750000000, 6000000000, 15000000000], 0, 'bench',
  map('cost_center', concat('cc-', toString(agent_number % 40)), 'env', 'prod'),
  'spendfuse.usage.v1', number % {LANES}, intDiv(number, {LANES}) AS nth, 0, 1 + number % {LANES}, nth,
  1 + intDiv(nth, {BATCH}), nth % {BATCH}
FROM numbers({{start}}, {{count}})
"""  # noqa: S608 - constants of this file


def say(text: str) -> None:
    """Write progress."""
    sys.stderr.write(f"\r\033[K{text}")
    sys.stderr.flush()


def charges(count: int) -> Iterator[LedgerEntry]:
    """Yield charges of many agents."""
    charge = Charge(
        cost_nanos=36_450_000, currency="USD", price_book="bench-1", priced_by="book", rates=[3_000_000_000] * 5
    )
    start = END - timedelta(days=1)
    for nth in range(count):
        at = start + timedelta(milliseconds=nth * 50)
        usage = Usage(
            id=f"stored-{nth}", ts=at, workspace="stored", team=f"team-{nth % 20}", agent=f"agent-{nth % AGENTS}",
            run=f"run-{nth % AGENTS}", provider="anthropic", model="claude-sonnet-4-6", workflow="stored",
            tokens=Tokens(input=nth % 1_500, cache_read=17_000, cache_write_5m=1_000, output=800),
            tags={"cost_center": f"cc-{nth % 40}"},
        )  # fmt: skip
        yield LedgerEntry(
            kind="charge", topic="spendfuse.usage.v1", partition=0, offset=nth, at=at, usage=usage, charge=charge
        )


def halts() -> Iterator[LedgerEntry]:
    """Yield halts of agents' daily caps over the last month, each obeyed."""
    for nth in range(HALTS):
        at = END - timedelta(hours=nth * 2 + 1)
        scope = f"agent:acme/team-{nth % 20}/agent-{nth}"
        day = at.replace(hour=0)
        command = Command(
            id=f"{nth:032x}", seq=nth + 1, action="halt", scope=scope, budget="agents", cap="daily", budget_version=1,
            issued_at=at, expires_at=day + timedelta(days=1), message="over its cap",
            window=CommandWindow(kind="day", label="day", timezone="UTC", start=day, end=day + timedelta(days=1)),
            measure=Measure(unit="nano-USD", cap=10**9, spend=2 * 10**9, committed=2 * 10**9, fraction=20_000),
            cause=Cause(usage_id=f"cause-{nth}", ts=at, partition=0, offset=nth),
        )  # fmt: skip
        yield LedgerEntry(
            kind="command", topic="spendfuse.commands.v1", partition=0, offset=nth, at=at, command=command
        )  # fmt: skip
        ack = Ack(
            command_id=command.id, seq=command.seq, scope=scope, budget="agents", cap="daily", agent=scope,
            guard=f"guard-{nth}", state="enforced", at=at + timedelta(milliseconds=40), halt_lag_us=40_000,
        )  # fmt: skip
        yield LedgerEntry(kind="ack", topic="spendfuse.acks.v1", partition=0, offset=nth, at=at, ack=ack)


def stored(database: Database, count: int) -> dict[str, float]:
    """Return rows a second of the whole way of the writer, and of the inserts in it alone."""
    messages: list[Message] = []
    pending: list[LedgerEntry] = []
    for entry in (*halts(), *charges(count)):
        pending.append(entry)
        if len(pending) == PER_MESSAGE:
            messages.append(Message(len(messages), to_us(END) // 1_000, encode(LedgerBatch(entries=pending))))
            pending = []
    collector = Collector("spendfuse.ledger.v1", 0, 1, 1, {}, BATCH)
    inserting = 0.0
    began = time.perf_counter()
    for nth, message in enumerate(messages):
        if not collector.add(message) or nth == len(messages) - 1:
            batch = collector.seal()
            before = time.perf_counter()
            trail.store(database, batch)
            inserting += time.perf_counter() - before
            say(f"stored {nth * PER_MESSAGE:,} of {count:,} rows")
            collector.add(message)
    took = time.perf_counter() - began
    ((rows,),) = database.query("SELECT count() FROM spendfuse.usage_events")
    return {"rows": rows, "rows_per_s": rows / took, "insert_rows_per_s": rows / inserting}


def verified(database: Database) -> dict[str, float]:
    """Return how fast `audit verify` goes over all there is; raises SystemExit if it is not intact."""
    began, used = time.perf_counter(), time.process_time()
    report = verify(database, now=END, progress=lambda done, total: say(f"verified {done:,} of {total:,} rows"))
    took, cpu = time.perf_counter() - began, time.process_time() - used
    if report.findings:
        raise SystemExit(f"what was just stored is not intact: {report.findings[0]}")
    return {"rows": report.rows, "rows_per_s": report.rows / took, "cpu_us_per_row": cpu * 1_000_000 / report.rows}


def fill(database: Database, rows: int) -> float:
    """Make rows by SQL, with all rollups, and return rows a second."""
    began = time.perf_counter()
    for start in range(0, rows, CHUNK):
        count = min(CHUNK, rows - start)
        database.command(FILL.format(token=f"fill-{start}", start=start, count=count, rows=rows))
        say(f"filled {start + count:,} of {rows:,} rows")
    took = time.perf_counter() - began
    deadline = time.monotonic() + MERGES_S_MAX
    while time.monotonic() < deadline and database.query("SELECT count() FROM system.merges")[0][0]:
        say("waiting for merges")
        time.sleep(0.2)
    return rows / took


def seal_filled(database: Database, rows: int) -> None:
    """Give the rows that SQL made their headers: roots are the database's, hashes and chain those of `audit.seal`."""
    text = verify_sql("verify_batches")
    trees = text[: text.index("SELECT\n  b.seq")]
    roots = f"{trees} SELECT batch_seq, found, found_sum, lower(hex(root)) FROM roots ORDER BY batch_seq"  # noqa: S608
    bind = {"expired_before": END, "dropped_before": END}
    for partition in range(1, 1 + LANES):
        link, batches = GENESIS, 1 + rows // (LANES * BATCH)
        for first in range(1, 1 + batches, SEALED_AT_ONCE):
            last = first + SEALED_AT_ONCE - 1
            found = database.query(roots, {**bind, "partition": partition, "seq_from": first, "seq_to": last})
            headers: list[dict[str, Any]] = []
            for seq, count, leaf_sum, root in found:
                offset = (seq - 1) * BATCH
                fields = HeaderFields(
                    LEAF_VERSION, partition, seq, offset, offset + count - 1, count, count, leaf_sum,
                    to_us(END) // 1_000, 0, 0, sha256(str(seq).encode()).hexdigest(), str(root), link,
                )  # fmt: skip
                link = header_hash(fields)
                headers.append(header_row(fields, link))
            if headers:
                columns = {name: [header[name] for header in headers] for name in headers[0]}
                database.insert(Table("audit_batches", columns), f"sealed-{partition}-{first}")
            say(f"sealed {min(last, batches):,} of {batches:,} batches of partition {partition}")


def header_row(fields: HeaderFields, header: str) -> dict[str, Any]:
    """Return a row of audit_batches."""
    names = {"partition": "ledger_partition", "written_at_ms": "written_at", "occurred_from_us": "occurred_from",
             "occurred_to_us": "occurred_to"}  # fmt: skip
    return {names.get(name, name): value for name, value in fields._asdict().items()} | {
        "generation": 1, "header_hash": header,
    }  # fmt: skip


def sizes(database: Database) -> dict[str, tuple[int, float]]:
    """Return rows and bytes a row on disk of each table that has rows."""
    found = database.query(
        "SELECT table, sum(rows), sum(bytes_on_disk) FROM system.parts WHERE active AND database = {db:String} "
        "GROUP BY table"
    )
    return {table: (int(rows), int(size) / int(rows)) for table, rows, size in sorted(found) if rows > 1}


def questions() -> dict[str, Callable[[Any], Any]]:
    """Return each question by its name: a report, or a panel over its last 24 hours and 30 days."""
    asked: dict[str, Callable[[Any], Any]] = {
        f"report {name}": lambda client, name=name: read(client, name, MONTH, "acme")
        for name in ("wallet", "team", "workflow", "models")
    }
    asked["report agent"] = lambda client: read(client, "agent", MONTH, "acme", team="")
    asked["report chargeback"] = lambda client: read_chargeback(client, MONTH, "acme")
    asked["audit duplicates"] = lambda client: read_duplicates(client, MONTH, "acme")
    asked["incidents"] = lambda client: client.query(
        queries.load("incidents"),
        parameters={"workspace": "acme", "id": "", "since": END - timedelta(days=30), "until": END, "limit": 20},
    )
    asked["report run"] = lambda client: read_run(client, RUN, "acme")
    choice = {"workspace": "acme", "team": ALL, "agent": [ALL]}
    for panel in panels():
        for span, hours in (("24 h", 24), ("30 d", 720)):
            sql = expand(panel.sql, from_us=to_us(END - timedelta(hours=hours)), to_us=to_us(END) - 1, variables=choice)
            asked[f"panel {panel.query}, {span}"] = lambda client, sql=sql: client.query(sql)
    return asked


def measured(client: Any, times: int) -> dict[str, dict[str, float]]:
    """Return p50, p95 and CPU of each question, in milliseconds; the first answer of each is not counted."""
    found = {}
    for name, ask in questions().items():
        say(name)
        ask(client)
        took = []
        used = time.process_time()
        for _ in range(times):
            began = time.perf_counter()
            ask(client)
            took.append((time.perf_counter() - began) * 1_000)
        cpu_ms = (time.process_time() - used) * 1_000 / times
        took.sort()
        found[name] = {
            "p50_ms": took[(len(took) - 1) // 2], "p95_ms": took[-(-len(took) * 95 // 100) - 1], "cpu_ms": cpu_ms,
        }  # fmt: skip
    return found


async def asked(engine: Engine, times: int) -> dict[str, dict[str, float]]:
    """Ask over HTTP."""
    endpoint = Endpoint(engine, "bench", 0)
    address = await endpoint.start()

    def ask() -> dict[str, dict[str, float]]:
        with queries.connect_to(address) as client:
            return measured(client, times)

    try:
        return await asyncio.to_thread(ask)
    finally:
        await endpoint.stop()


def run(directory: Path, rows: int, count: int, times: int, *, ask: bool = True) -> dict[str, Any]:
    """Return every figure of one database; one that is kept and full is asked as it is, or not at all."""
    engine = Engine(directory, "spendfuse")
    database = open_embedded(engine)
    try:
        migrate.apply(database)
        database.command("USE spendfuse")
        ((there,),) = database.query("SELECT count() FROM spendfuse.usage_events WHERE workspace = 'acme'")
        found: dict[str, Any] = {"rows": rows}
        if not there:
            found["stored"] = stored(database, count)
        if not there:
            found["fill_rows_per_s"] = fill(database, rows)
            seal_filled(database, rows)
        elif int(there) != rows:
            raise SystemExit(
                f"{directory} holds {there:,} rows and {rows:,} are wanted: give another --keep, or --rows"
            )
        found["tables"] = sizes(database)
        if ask:
            found["verify"] = verified(database)
            found["questions"] = asyncio.run(asked(engine, times))
    finally:
        database.close()
    found["memory_peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (
        1_024 if sys.platform == "linux" else 1_048_576
    )
    return found


async def wait_in_ledger(stack: EmbeddedStack, count: int) -> None:
    """Write so many charges to the ledger, as a meter does."""
    async with AIOKafkaProducer(**producer_options(stack.broker, "bench")) as producer:
        pending: list[LedgerEntry] = []
        for nth, entry in enumerate(charges(count), 1):
            pending.append(entry)
            if len(pending) == PER_MESSAGE or nth == count:
                await producer.send(LEDGER.name, encode(LedgerBatch(entries=pending)), partition=0)
                pending = []
                if nth % 20_000 == 0:
                    say(f"{nth:,} of {count:,} rows wait in the ledger")
        await producer.flush()


def caught_up(directory: Path, count: int) -> dict[str, float]:
    """Return how fast the audit process takes what has waited, and its memory; raises BrokerUnavailableError."""
    with EmbeddedStack(directory / "stack", partitions=1, workers=0, audit=False) as stack:
        asyncio.run(wait_in_ledger(stack, count))
        home, ready = directory / "catch-up", directory / "ready"
        own = {name: value for name, value in os.environ.items() if not name.startswith("SPENDFUSE_")}
        process = ChildProcess(
            "audit", [sys.executable, "-m", "spendfuse.audit"], log_path=directory / "audit.log",
            env={**own, **stack.env, "SPENDFUSE_CHDB_DIR": str(home), "SPENDFUSE_HTTP_PORT": "0",
                 "SPENDFUSE_READY_FILE": str(ready)},
        )  # fmt: skip
        with process:
            process.wait_until(ready.exists, CATCH_UP_S_MAX)
            memory, written, began = 0, 0, time.perf_counter()
            its, at_home = psutil.Process(process.pid), AuditSettings(chdb_dir=str(home))
            while written < count and time.perf_counter() - began < CATCH_UP_S_MAX:
                with contextlib.suppress(AuditNotRunningError), queries.connect(at_home) as asking:
                    written = int(asking.command("SELECT sum(rows) FROM audit_batches"))
                memory = max(memory, its.memory_info().rss)
                say(f"caught up on {written:,} of {count:,} rows")
                time.sleep(LOOK_S)
            took = time.perf_counter() - began
            used = its.cpu_times()
    if written < count:
        raise SystemExit(f"only {written:,} of {count:,} rows were caught up on in {took:,.0f} s")
    return {
        "rows": count, "seconds": took, "rows_per_s": count / took, "memory_peak_mib": memory / 1_048_576,
        "cpu_us_per_row": (used.user + used.system) * 1_000_000 / count,
    }  # fmt: skip


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--stored", type=int, default=200_000)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--backlog", type=int, default=360_000)
    parser.add_argument("--keep", type=Path, metavar="DIR")
    parser.add_argument("--build-only", action="store_true", help="fill the kept directory, and ask nothing yet")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="spendfuse-bench-") as directory:
        home = given.keep or Path(directory) / "filled"
        found = run(home, given.rows, given.stored, given.times, ask=not given.build_only)
        if given.backlog and not given.build_only:
            try:
                found["catch_up"] = caught_up(Path(directory), given.backlog)
            except BrokerUnavailableError as error:
                found["catch_up_skipped"] = str(error)
    say("")
    if given.json:
        print(json.dumps(found, indent=1))
    else:
        report(found)


def report(found: dict[str, Any]) -> None:
    """Print every figure."""
    if way := found.get("stored"):
        print(f"written as the audit writes, {way['rows']:,} rows: {way['rows_per_s']:,.0f} rows/s")
        print(f"  the inserts alone, with rollups: {way['insert_rows_per_s']:,.0f} rows/s")
    if "verify" not in found:
        print(f"built, {found['rows']:,} rows; ask with the same --rows and --keep, without --build-only")
        return
    way = found["verify"]
    print(
        f"verified, {way['rows']:,} rows: {way['rows_per_s']:,.0f} rows/s, {way['cpu_us_per_row']:.2f} us of CPU each"
    )
    if "fill_rows_per_s" in found:
        print(f"filled by SQL, with rollups, {found['rows']:,} rows: {found['fill_rows_per_s']:,.0f} rows/s")
    for table, (rows, size) in found["tables"].items():
        print(f"  {table:20} {rows:>12,} rows {size:8.1f} bytes/row")
    print(f"{'question':42} {'p50 ms':>8} {'p95 ms':>8} {'CPU ms':>8}")
    for name, took in found["questions"].items():
        slow = f"  over {SLOW_MS:g} ms" if took["p95_ms"] > SLOW_MS else ""
        print(f"{name:42} {took['p50_ms']:8.1f} {took['p95_ms']:8.1f} {took['cpu_ms']:8.1f}{slow}")
    slow_ones = sum(took["p95_ms"] > SLOW_MS for took in found["questions"].values())
    print(f"{slow_ones} of {len(found['questions'])} questions over {SLOW_MS:g} ms at p95")
    print(f"memory at its peak, engine and client in one process: {found['memory_peak_mib']:,} MiB")
    if way := found.get("catch_up"):
        print(
            f"caught up after an outage, {way['rows']:,} rows that waited in Kafka: {way['seconds']:,.1f} s, "
            f"{way['rows_per_s']:,.0f} rows/s, {way['cpu_us_per_row']:,.0f} us of CPU a row"
        )
        print(f"  the audit process meanwhile, at its peak: {way['memory_peak_mib']:,.0f} MiB")
    elif why := found.get("catch_up_skipped"):
        print(f"not measured, catching up after an outage: {why}")


if __name__ == "__main__":
    main()
