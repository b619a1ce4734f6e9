"""Changelogs are read to their ends by ourselves: the same state as Faust's recovery gives, and nothing left for it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaConnectionError
from faust.tables.recovery import Recovery
from faust.types import TP

from spendfuse.client.connection import producer_options
from spendfuse.engine.state import ScopeState
from spendfuse.pipeline import changelogs, faust_cures
from spendfuse.pipeline.codec import encode_scope
from workers import quick_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spendfuse.embedded.tansu import EmbeddedBroker

DEADLINE_S = 30.0
PLACES = [TP("scopes-changelog", number) for number in range(2)]


@pytest.fixture
def uncured() -> Iterator[None]:
    yield
    faust_cures.uninstall()


class FakeConsumer:
    """Answers how far changelogs go."""

    async def earliest_offsets(self, *places: TP) -> dict[TP, int]:
        return dict.fromkeys(places, 0)


def recovering(ends: dict[TP, int]) -> Recovery:
    """Return a recovery of one table, as far as `_build_offsets` and the cure look at it."""
    store = SimpleNamespace(table_name="scopes", data={}, _key_partition={})
    recovery = Recovery.__new__(Recovery)
    recovery.active_highwaters = ends  # type: ignore[assignment]  # a Counter, of which it is asked nothing else
    recovery.active_offsets = dict.fromkeys(ends)  # type: ignore[assignment]  # the same
    recovery.tp_to_table = dict.fromkeys(ends, SimpleNamespace(data=store))  # type: ignore[arg-type]
    recovery.log = SimpleNamespace(info=lambda *_: None)  # type: ignore[assignment]
    return recovery


def record(partition: int, offset: int, key: bytes, value: bytes | None) -> Any:
    return SimpleNamespace(partition=partition, offset=offset, key=key, value=value)


def state(mark: int) -> bytes:
    return encode_scope(ScopeState(marks={0: mark}))


async def after(read: faust_cures.Read | None, ends: dict[TP, int]) -> Recovery:
    faust_cures.install(20, read=read)
    recovery = recovering(ends)
    await recovery._build_offsets(FakeConsumer(), set(ends), recovery.active_offsets, "active")  # type: ignore[arg-type]
    return recovery


@pytest.mark.parametrize("cured", [True, False], ids=["cured", "as Faust is"])
async def test_nothing_is_left_for_fausts_slow_recovery_and_the_newest_states_are_in_the_table(
    uncured: None, *, cured: bool
) -> None:
    batches = [
        (PLACES[0], [record(0, 0, b"0/a", state(5)), record(0, 1, b"0/b", state(1)), record(0, 2, b"0/b", None)]),
        (PLACES[0], [record(0, 4, b"0/a", state(3))]),  # what a worker that was cut off had sent; 3 was compacted away
        (PLACES[1], [record(1, 9, b"1/c", state(7))]),
    ]

    async def read(spans: Any, apply: changelogs.Apply) -> None:
        assert spans == {PLACES[0]: (0, 4), PLACES[1]: (0, 9)}
        for place, records in batches:
            apply(place, records)

    recovery = await after(read if cured else None, {PLACES[0]: 4, PLACES[1]: 9})
    store: Any = recovery.tp_to_table[PLACES[0]].data
    assert recovery.need_recovery() is not cured
    assert store.data == ({b"0/a": state(5), b"1/c": state(7)} if cured else {})
    assert store._key_partition == ({b"0/a": 0, b"1/c": 1} if cured else {}), "else it would outlive its partition"
    assert faust_cures.take_stale("scopes") == ({b"0/a"} if cured else set()), "it is to be written again"


async def test_what_a_broker_does_not_give_is_left_to_fausts_recovery(uncured: None) -> None:
    async def read(_spans: Any, apply: changelogs.Apply) -> None:
        apply(PLACES[0], [record(0, 2, b"0/a", state(5))])
        raise KafkaConnectionError("away")

    recovery = await after(read, {PLACES[0]: 4, PLACES[1]: -1})
    assert recovery.active_offsets == {PLACES[0]: 2, PLACES[1]: -1}, "it goes on from there"
    assert recovery.need_recovery()


async def test_a_partition_that_is_taken_away_meanwhile_leaves_nothing_behind(uncured: None) -> None:
    recoveries: list[Recovery] = []

    async def read(_spans: Any, apply: changelogs.Apply) -> None:
        recoveries[0].revoke(PLACES[0])
        apply(PLACES[0], [record(0, 4, b"0/a", state(5))])

    faust_cures.install(20, read=read)
    recovery = recovering({PLACES[0]: 4})
    recovery.standby_offsets = recovery.standby_highwaters = {}  # type: ignore[assignment]
    recoveries.append(recovery)
    await recovery._build_offsets(FakeConsumer(), set(PLACES[:1]), recovery.active_offsets, "active")  # type: ignore[arg-type]
    assert recovery.active_offsets == {}, "given back later, it would pass for read"
    assert recovery.tp_to_table[PLACES[0]].data.data == {}


@pytest.mark.broker
async def test_partitions_are_read_from_where_they_were_left_to_where_they_ended_and_no_further_is_waited_for(
    tansu: EmbeddedBroker,
) -> None:
    topic = "test-changelogs-read"
    settings = quick_settings(tansu)
    counts = {0: 2_500, 1: 3, 2: 0}
    admin = AIOKafkaAdminClient(bootstrap_servers=tansu.bootstrap_servers)
    await admin.start()
    await admin.create_topics([NewTopic(topic, len(counts), 1)])
    await admin.close()
    async with AIOKafkaProducer(**producer_options(settings, "test")) as producer:
        sent = [
            await producer.send(topic, b"%d" % number, key=b"k", partition=partition)
            for partition, count in counts.items()
            for number in range(count)
        ]
        await asyncio.gather(*sent)
    taken: dict[int, list[bytes]] = {0: [], 1: []}
    batches: list[int] = []

    def apply(place: TopicPartition, records: Any) -> None:
        taken[place.partition] += [each.value for each in records]
        batches.append(len(records))

    spans = {TopicPartition(topic, 0): (5, counts[0] - 1), TopicPartition(topic, 1): (0, counts[1] - 1)}
    async with asyncio.timeout(DEADLINE_S):
        reached = await changelogs.read_to_end(settings, spans, apply)
    assert reached == {place: last for place, (_, last) in spans.items()}
    assert taken == {number: [b"%d" % each for each in range(5 - 5 * number, counts[number])] for number in (0, 1)}
    assert max(batches) <= changelogs.RECORDS_MAX, "heartbeats go out in between"


@pytest.mark.broker
async def test_a_partition_of_which_nothing_comes_is_given_up(
    tansu: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changelogs, "STUCK_S_MAX", 0.3)
    place = TopicPartition("test-changelogs-stuck", 0)
    async with AIOKafkaProducer(**producer_options(quick_settings(tansu), "test")) as producer:
        await producer.send_and_wait(place.topic, b"only", key=b"k", partition=0)
    taken: list[bytes] = []
    async with asyncio.timeout(DEADLINE_S):
        reached = await changelogs.read_to_end(
            quick_settings(tansu), {place: (0, 99)}, lambda _, records: taken.extend(each.value for each in records)
        )
    assert (taken, reached) == ([b"only"], {place: 0})
