"""`spendfuse dlq` against the embedded broker: what was refused is found, shown without harm, and offered again."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka import AIOKafkaProducer
from typer.testing import CliRunner

from spendfuse.cli.app import app
from spendfuse.client.connection import producer_options
from spendfuse.client.follow import Follower, Record
from spendfuse.embedded.tansu import BrokerUnavailableError, EmbeddedBroker
from spendfuse.pipeline.publish import dead_letter_headers
from spendfuse.pipeline.records import SourceRecord
from spendfuse.pipeline.topics import ensure_topics
from spendfuse.settings import BrokerSettings
from spendfuse.wire.topics import DEAD_LETTERS, USAGE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.broker
DEADLINE_S = 20.0
NASTY = b'{"id":"\x1b[2J\x07"}\xff'
LETTERS = [
    (USAGE.name, "ts: 700000 s old; the most is 604800 s", b'{"id":"late"}'),
    (USAGE.name, "not JSON", NASTY),
    ("spendfuse.acks.v1", "not JSON", b"an ack"),
    (USAGE.name, "the record has no value", b""),
]


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerSettings]:
    try:
        started = EmbeddedBroker(tmp_path_factory.mktemp("dlq")).start()
    except BrokerUnavailableError as error:
        pytest.skip(str(error))
    with started:
        settings = BrokerSettings.from_env(
            {}, bootstrap_servers=started.bootstrap_servers, fetch_max_wait_ms=20, producer_max_batch_size=1
        )
        asyncio.run(_fill(settings))
        yield settings


async def _fill(settings: BrokerSettings) -> None:
    await ensure_topics(settings, partitions=2, replication=1)
    producer = AIOKafkaProducer(**producer_options(settings, "test-dlq"))
    await producer.start()
    for number, (topic, reason, value) in enumerate(LETTERS):
        headers = dead_letter_headers(SourceRecord(topic, 0, number, 0, None, value), reason, 0)
        await producer.send_and_wait(DEAD_LETTERS.name, value, key=b"k", partition=0, headers=list(headers))
    await producer.stop()


def run(broker: BrokerSettings, tmp_path: Path, *words: str) -> Any:
    env = {
        "SPENDFUSE_BOOTSTRAP_SERVERS": broker.bootstrap_servers,
        "SPENDFUSE_FETCH_MAX_WAIT_MS": "20",
        "SPENDFUSE_PRODUCER_MAX_BATCH_SIZE": "1",
        "SPENDFUSE_STATE_DIR": str(tmp_path),
    }
    return CliRunner().invoke(app, ["dlq", *words], env=env)


async def usages(broker: BrokerSettings) -> list[Record]:
    records: list[Record] = []
    async with Follower(broker, USAGE.name, records.append) as follower:
        await asyncio.wait_for(follower.caught_up(), DEADLINE_S)
    return records


def test_letters_are_listed_shown_without_harm_and_replayed_as_they_were(
    broker: BrokerSettings, tmp_path: Path
) -> None:
    listed = run(broker, tmp_path, "list", "--json")
    assert listed.exit_code == 0, listed.output
    assert [row["reason"] for row in json.loads(listed.stdout)["letters"]] == [reason for _, reason, _ in LETTERS]
    late = run(broker, tmp_path, "list", "--reason", "the most is", "--topic", USAGE.name, "--json")
    assert [row["offset"] for row in json.loads(late.stdout)["letters"]] == [0]

    raw = tmp_path / "raw.bin"
    shown = run(broker, tmp_path, "show", "1", "--raw", str(raw))
    assert shown.exit_code == 0, shown.output
    assert "\x1b" not in shown.output
    assert "\x07" not in shown.output
    assert r'{"id":"\x1b[2J\x07"}\xff' in shown.stdout
    assert raw.read_bytes() == NASTY

    assert run(broker, tmp_path, "replay").exit_code == 2, "everything is never meant by saying nothing"
    dry = run(broker, tmp_path, "replay", "--all", "--dry-run")
    assert dry.exit_code == 1, "two of them cannot be replayed"
    assert asyncio.run(usages(broker)) == []

    replayed = run(broker, tmp_path, "replay", "0", "1", "--json")
    assert replayed.exit_code == 0, replayed.output
    assert json.loads(replayed.stdout)["replayed"] == 2
    found = asyncio.run(usages(broker))
    assert sorted(record.value or b"" for record in found) == sorted([LETTERS[0][2], NASTY])
    marks = {record.value: record.header("spendfuse-replay-of") for record in found}
    assert marks[NASTY] == b"spendfuse.usage.dlq.v1/0/1"

    forced = run(broker, tmp_path, "replay", "2", "--force")
    assert forced.exit_code == 0, forced.output
    missing = run(broker, tmp_path, "show", "99")
    assert missing.exit_code == 1
    assert "no dead letter at offset 99" in missing.stderr
