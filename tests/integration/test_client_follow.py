"""The Follower against a broker: everything from the first record, once caught up it says so, then live."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from spendfuse.client.follow import Follower, Record
from spendfuse.embedded.processes import free_port
from spendfuse.embedded.tansu import EmbeddedBroker, broker_binary
from spendfuse.settings import BrokerSettings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DEADLINE_S = 20.0


@pytest.fixture(
    scope="module",
    params=[pytest.param("tansu", marks=pytest.mark.broker), pytest.param("kraft", marks=pytest.mark.kafka)],
)
def bootstrap(request: pytest.FixtureRequest) -> str:
    servers: str = request.getfixturevalue(request.param).bootstrap_servers
    return servers


def settings(bootstrap: str) -> BrokerSettings:
    return BrokerSettings.from_env({}, bootstrap_servers=bootstrap, fetch_max_wait_ms=20)


async def create(bootstrap: str, topic: str, partitions: int) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    await admin.create_topics([NewTopic(topic, partitions, 1)])
    await admin.close()


async def produce(bootstrap: str, topic: str, *values: str, partitions: int = 1) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", max_batch_size=1)
    await producer.start()
    for nth, value in enumerate(values):
        await producer.send_and_wait(topic, value.encode(), b"k", partition=nth % partitions, headers=[("h", b"1")])
    await producer.stop()


async def wait_until(true: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < give_up_at, "waited in vain"
        await asyncio.sleep(0.01)


async def test_all_partitions_are_read_before_it_has_caught_up_and_then_live(bootstrap: str) -> None:
    topic = "test-follow-all"
    await create(bootstrap, topic, 3)
    before = [f"before-{nth}" for nth in range(700)]  # more than one round
    await produce(bootstrap, topic, *before, partitions=3)
    records: list[Record] = []
    at_that_time: list[int] = []
    async with Follower(
        settings(bootstrap), topic, records.append, on_caught_up=lambda: at_that_time.append(len(records))
    ) as follower:
        await asyncio.wait_for(follower.caught_up(), DEADLINE_S)
        assert at_that_time == [700]
        assert sorted(record.value.decode() for record in records if record.value) == sorted(before)
        for partition in range(3):
            offsets = [record.offset for record in records if record.partition == partition]
            assert offsets == list(range(len(offsets)))
        assert (records[0].topic, records[0].key, records[0].header("h"), records[0].header("other")) == (
            *(topic, b"k", b"1", None),
        )
        await produce(bootstrap, topic, "live-1", "live-2", partitions=3)
        await wait_until(lambda: len(records) == 702)
        assert {record.value for record in records[700:]} == {b"live-1", b"live-2"}


async def test_an_empty_topic_is_caught_up_at_once(bootstrap: str) -> None:
    await create(bootstrap, "test-follow-empty", 2)
    async with Follower(settings(bootstrap), "test-follow-empty", print) as follower:
        await asyncio.wait_for(follower.caught_up(), DEADLINE_S)
        assert follower.records == 0


async def test_a_topic_that_does_not_exist_yet_is_waited_for_and_not_created(bootstrap: str) -> None:
    topic = "test-follow-later"
    records: list[Record] = []
    async with Follower(settings(bootstrap), topic, records.append) as follower:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(follower.caught_up(), 1.2)
        admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
        await admin.start()
        assert topic not in await admin.list_topics()
        await admin.close()
        await create(bootstrap, topic, 1)
        await produce(bootstrap, topic, "first")
        await wait_until(lambda: len(records) == 1)
        await asyncio.wait_for(follower.caught_up(), DEADLINE_S)


async def test_a_record_that_cannot_be_used_does_not_hide_those_behind_it(bootstrap: str) -> None:
    topic = "test-follow-fault"
    await create(bootstrap, topic, 1)
    await produce(bootstrap, topic, "1", "x", "3")
    numbers: list[int] = []
    async with Follower(settings(bootstrap), topic, lambda record: numbers.append(int(record.value or b""))) as one:
        await asyncio.wait_for(one.caught_up(), DEADLINE_S)
        assert (numbers, one.faults) == ([1, 3], 1)


async def test_who_is_cancelled_while_a_follower_stops_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    closing = asyncio.Event()

    async def slow_to_close(self: Follower) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            closing.set()
            await asyncio.sleep(DEADLINE_S)

    monkeypatch.setattr(Follower, "_follow_until_it_fails", slow_to_close)
    follower = Follower(settings(f"127.0.0.1:{free_port()}"), "test-follow-slow", print)
    follower.start()
    await asyncio.sleep(0)  # it runs
    stopping = asyncio.create_task(follower.stop())
    await asyncio.wait_for(closing.wait(), DEADLINE_S)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping


@pytest.mark.parametrize("after", [1, 2, 5])
async def test_a_topic_made_anew_is_read_from_its_beginning_however_long_it_is_by_now(
    tmp_path: Path, after: int
) -> None:
    port, topic = free_port(), "test-follow-anew"
    bootstrap = f"127.0.0.1:{port}"
    values: list[bytes | None] = []
    async with Follower(settings(bootstrap), topic, lambda record: values.append(record.value)):
        for life, count in (("old", 2), ("new", after)):
            broker = EmbeddedBroker(tmp_path / life)
            broker._start_at(port, broker_binary(tmp_path / life))
            with contextlib.ExitStack() as stack:
                stack.callback(broker.stop)
                await create(bootstrap, topic, 1)
                expected = [f"{life}-{nth}" for nth in range(count)]
                await produce(bootstrap, topic, *expected)
                await wait_until(lambda: values[-1:] == [expected[-1].encode()])  # noqa: B023 - used within its round
    assert values == [b"old-0", b"old-1", *(f"new-{nth}".encode() for nth in range(after))]
