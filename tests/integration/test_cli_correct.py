"""`spendfuse usage correct`: the charge is found in the trail, the difference is signed and lies on `usage.v1`."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from audit_samples import charge, correction, message

pytest.importorskip("chdb", reason="the embedded ClickHouse needs the chdb package")
pytest.importorskip("aiohttp")

from typer.testing import CliRunner

from spendfuse.audit import migrate, trail
from spendfuse.audit.batches import Collector, Message
from spendfuse.audit.database import Engine, open_embedded
from spendfuse.audit.endpoint import Endpoint
from spendfuse.cli.app import app
from spendfuse.client.accept import accept_correction
from spendfuse.client.follow import Follower, Record
from spendfuse.client.keys import Verifier, generate
from spendfuse.embedded.tansu import BrokerUnavailableError, EmbeddedBroker
from spendfuse.pipeline.topics import ensure_topics
from spendfuse.settings import BrokerSettings
from spendfuse.wire.topics import USAGE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.broker
DEADLINE_S = 20.0
PRIVATE, PUBLIC = generate("ada")
CHARGE = charge(6)
FIX = correction(CHARGE, 100, tokens=-4)
"""What was corrected before: 4 tokens of output and 4 nano-units less."""
TWICE = [charge(8, team="research"), charge(9, id="call-0-8", team="support")]
RATE = 25_000
"""Nano-units of a token of output, by the charge's own rates (25,000,000,000 a million)."""


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerSettings]:
    try:
        started = EmbeddedBroker(tmp_path_factory.mktemp("broker")).start()
    except BrokerUnavailableError as error:
        pytest.skip(str(error))
    with started:
        settings = BrokerSettings.from_env(
            {}, bootstrap_servers=started.bootstrap_servers, fetch_max_wait_ms=20, producer_max_batch_size=1
        )
        asyncio.run(ensure_topics(settings, partitions=2, replication=1))
        yield settings


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    opened = Engine(tmp_path_factory.mktemp("correct") / "clickhouse", "trail")
    database = open_embedded(opened)
    try:
        migrate.apply(database)
        collector = Collector("spendfuse.ledger.v1", 0, 1, 1, {}, 5_000)
        assert collector.add(Message(0, 0, message([CHARGE, *TWICE, FIX])))
        trail.store(database, collector.seal())
        yield opened
    finally:
        database.close()


@pytest_asyncio.fixture
async def run(
    engine: Engine, broker: BrokerSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> AsyncIterator[Callable[..., Any]]:
    """Run the command as an operator with a key would."""
    endpoint = Endpoint(engine, "token", 0)
    (await endpoint.start()).write(engine.directory)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPENDFUSE_CHDB_DIR", str(engine.directory))
    monkeypatch.setenv("SPENDFUSE_BOOTSTRAP_SERVERS", broker.bootstrap_servers)
    monkeypatch.setenv("SPENDFUSE_SIGNING_KEY", PRIVATE)
    monkeypatch.setenv("SPENDFUSE_FETCH_MAX_WAIT_MS", "20")
    monkeypatch.setenv("SPENDFUSE_PRODUCER_MAX_BATCH_SIZE", "1")

    async def invoke(*words: str, exit_code: int = 0) -> Any:
        result = await asyncio.to_thread(CliRunner().invoke, app, ["usage", "correct", *words])
        assert result.exit_code == exit_code, result.output
        return result

    try:
        yield invoke
    finally:
        await endpoint.stop()


async def records(broker: BrokerSettings) -> list[Record]:
    found: list[Record] = []
    async with Follower(broker, USAGE.name, found.append) as follower:
        await asyncio.wait_for(follower.caught_up(), DEADLINE_S)
    return found


async def test_the_final_numbers_become_a_signed_difference_to_what_is_counted_now(run: Any, broker: Any) -> None:
    assert CHARGE.usage is not None
    assert CHARGE.charge is not None
    tokens, rates = CHARGE.usage.tokens, CHARGE.charge.rates
    final = tokens.output + 100
    done = await run("call-0-6", "--output", str(final), "--reason", "provider_final", "--by", "ada", "--yes", "--json")
    stated = json.loads(done.stdout)["correction"]
    femto = Counter(
        {name: getattr(tokens, name) for name in ("input", "cache_read", "cache_write_5m", "cache_write_1h")}
    )
    whole = sum(count * rate for count, rate in zip(femto.values(), rates, strict=False)) + final * rates[-1]
    assert whole % 1_000_000 == 0, "no halves to round"
    assert stated["tokens"]["output"] == 100 + 4
    assert stated["cost_nanos"] == whole // 1_000_000 - (CHARGE.charge.cost_nanos - 4)
    lying = [record for record in await records(broker) if stated["id"].encode() in (record.value or b"")]
    accepted = accept_correction(lying[0], Verifier.parse(PUBLIC), unsigned=False)
    assert (accepted.usage_id, accepted.run, accepted.by) == ("call-0-6", CHARGE.usage.run, "ada")
    assert accepted.ts == CHARGE.usage.ts
    assert accepted.tags == CHARGE.usage.tags
    again = await run("call-0-6", "--output", str(final), "--reason", "manual", "--by", "bob", "--yes", "--json")
    assert json.loads(again.stdout)["correction"]["id"] == stated["id"], "said twice, applied once"


async def test_a_final_cost_is_taken_to_the_nano_and_shown_before_it_is_stated(run: Any) -> None:
    assert CHARGE.charge is not None
    done = await run("call-0-6", "--cost", "0.001000001", "--reason", "invoice", "--by", "ada", "--yes")
    assert "counted now" in done.stdout
    shown = next(line for line in done.stdout.splitlines() if line.startswith("cost USD"))
    difference = 1_000_001 - (CHARGE.charge.cost_nanos - 4)
    assert shown.split()[-1] == f"{'-' if difference < 0 else '+'}0.{abs(difference):09d}"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["nobody", "--output", "1"], 1, "has no charge 'nobody'"),
        (["call-0-8", "--output", "1"], 2, "add --agent"),
        (["call-0-6"], 2, "say what the usage should have been"),
        (["call-0-6", "--cost", "0.0000000001"], 2, "at most 9 decimals"),
        (["call-0-6", "--cost", "NaN"], 2, "not below zero"),
        (["call-0-6", "--reasoning", "1000"], 2, "is part of output"),
        (["call-0-6", "--output", "1", "--reason", "refund"], 2, "reason"),
    ],
)
async def test_what_cannot_be_stated_is_said_and_nothing_is_sent(
    run: Any, broker: Any, words: list[str], code: int, says: str
) -> None:
    before = len(await records(broker))
    given = [*words, "--by", "ada", "--yes", *([] if "--reason" in words else ["--reason", "manual"])]
    done = await run(*given, exit_code=code)
    assert says in done.stderr
    assert len(await records(broker)) == before


async def test_nobody_is_asked_where_nobody_is(run: Any, broker: Any) -> None:
    before = len(await records(broker))
    done = await run("call-0-6", "--output", "1000", "--reason", "manual", "--by", "ada", exit_code=2)
    assert "say --yes" in done.stderr
    assert len(await records(broker)) == before
