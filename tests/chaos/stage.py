"""What a chaos run breaks: a Kafka, two workers (one behind proxies that can be cut) and the audit, kept running."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
import urllib.parse
import urllib.request
from typing import TYPE_CHECKING, Any

from aiokafka import AIOKafkaConsumer, TopicPartition

from chaos.oracle import Topics
from chaos.proxy import Proxy
from kraft import KraftBroker
from pipeline.samples import BOOK
from spendfuse.client.connection import consumer_options
from spendfuse.client.keys import generate
from spendfuse.embedded.processes import ChildProcess, free_port
from spendfuse.settings import PREFIX, BrokerSettings
from spendfuse.wire import encode
from workers import ROOT, WorkerProcess, broker_env

if TYPE_CHECKING:
    from pathlib import Path

    from chaos.oracle import Record

PARTITIONS = 4
SESSION_MS = 6_000
WATCH_S = 0.1
READY_S = 90.0
READ_S = 60.0
TOPICS = {
    "usage": "spendfuse.usage.v1",
    "budgets": "spendfuse.budgets.v1",
    "commands": "spendfuse.commands.v1",
    "ledger": "spendfuse.ledger.v1",
    "rollups": "spendfuse.rollups.v1",
    "scopes": "spendfuse-scopes-changelog",
    "shared": "spendfuse-shared-changelog",
}


class CuttableKafka(KraftBroker):
    """A Kafka with a second listener on each node, which it advertises at the address of a proxy."""

    def __init__(self, nodes: int) -> None:
        super().__init__(nodes)
        self.ways = {node: (free_port(), free_port()) for node in range(1, nodes + 1)}

    @property
    def proxied_servers(self) -> str:
        """The proxies' addresses, comma separated."""
        return ",".join(f"127.0.0.1:{proxy}" for proxy, _ in self.ways.values())

    def _server_properties(self, node: Any) -> str:
        proxy, target = self.ways[node.node_id]
        lines = []
        for line in super()._server_properties(node).splitlines():
            name = line.partition("=")[0]
            extra = {
                "listeners": f",PROXIED://127.0.0.1:{target}",
                "advertised.listeners": f",PROXIED://127.0.0.1:{proxy}",
                "listener.security.protocol.map": ",PROXIED:PLAINTEXT",
            }.get(name, "")
            lines.append(line + extra)
        return "\n".join(lines) + "\n"


class Stage:
    """Starts everything, starts again what has ended by itself, and reads the topics at the end."""

    def __init__(self, directory: Path, nodes: int, *, audit: bool) -> None:
        """`directory` takes logs and data; with three nodes topics have three replicas."""
        self.directory = directory
        self.kafka = CuttableKafka(nodes)
        self.replication = min(3, nodes)
        self.with_audit = audit
        self.parts: dict[str, ChildProcess] = {}
        self.held: set[str] = set()
        self.ended_by_itself = 0
        self.proxies: list[Proxy] = []
        self.private, self.public = generate("chaos")
        self.http_port, self.token = free_port(), os.urandom(16).hex()
        self.book = encode(BOOK)
        self._watching: asyncio.Task[None] | None = None

    def settings(self, servers: str) -> BrokerSettings:
        """Return how to reach the Kafka by some of its listeners."""
        return BrokerSettings.from_env(
            {},
            bootstrap_servers=servers,
            session_timeout_ms=SESSION_MS,
            rebalance_timeout_ms=SESSION_MS,
        )

    @property
    def broker(self) -> BrokerSettings:
        """How the test itself reaches the Kafka: by no proxy."""
        return self.settings(self.kafka.bootstrap_servers)

    async def start(self) -> None:
        """Start all but the Kafka, and wait until the workers are ready."""
        for proxy, target in self.kafka.ways.values():
            self.proxies.append(Proxy(proxy, target))
            await self.proxies[-1].start()
        book = self.directory / "book.json"
        book.write_bytes(self.book)
        env = {
            f"{PREFIX}PRICE_BOOK_FILE": str(book),
            f"{PREFIX}SIGNING_KEY": self.private,
            f"{PREFIX}PARTITIONS": str(PARTITIONS),
            f"{PREFIX}REPLICATION": str(self.replication),
        }
        ways = {"worker-1": self.broker, "worker-2": self.settings(self.kafka.proxied_servers)}
        for name, broker in ways.items():
            self.parts[name] = WorkerProcess(self.directory, name, broker, env)
        if self.with_audit:
            self.parts["audit"] = self._audit()
        for part in self.parts.values():
            begin(part)
            if isinstance(part, WorkerProcess):
                await asyncio.to_thread(part.until_ready)
        self._watching = asyncio.create_task(self._keep_running())

    async def stop(self) -> None:
        """End everything."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        for part in self.parts.values():
            await asyncio.to_thread(part.kill)
        for proxy in self.proxies:
            await proxy.stop()
        await asyncio.to_thread(self.kafka.stop)

    async def _keep_running(self) -> None:
        """Start again what ended and is not meant to be down, as any supervisor of processes does."""
        while True:
            for name, part in self.parts.items():
                if name not in self.held and not part.alive:
                    self.ended_by_itself += 1
                    begin(part)
            await asyncio.sleep(WATCH_S)

    def _audit(self) -> ChildProcess:
        env = {key: value for key, value in os.environ.items() if not key.startswith(PREFIX)}
        own = {
            "PYTHONPATH": str(ROOT / "streams"),
            f"{PREFIX}CHDB_DIR": str(self.directory / "chdb"),
            f"{PREFIX}HTTP_PORT": str(self.http_port),
            f"{PREFIX}HTTP_TOKEN": self.token,
        }
        argv = [sys.executable, "-m", "spendfuse.audit"]
        log = self.directory / "audit.log"
        return ChildProcess("audit", argv, log_path=log, env=env | broker_env(self.broker) | own)

    async def read(self) -> Topics:
        """Return all records of the topics that the oracle compares."""
        consumer = AIOKafkaConsumer(**consumer_options(self.broker, "chaos-oracle"))
        async with asyncio.timeout(READ_S):
            await consumer.start()
            try:
                return Topics(**{field: await _read(consumer, topic) for field, topic in TOPICS.items()})
            finally:
                await consumer.stop()

    def stored(self) -> list[list[Any]] | None:
        """Return [agent path, nanos, tokens, charges] of each agent in ClickHouse; None without an audit."""
        if not self.with_audit:
            return None
        query = (
            "SELECT concat(workspace, '/', team, '/', agent), sum(cost_nanos), sum(input_tokens + output_tokens), "
            "sum(calls) "
            "FROM net_charges GROUP BY 1 FORMAT JSONCompact"
        )
        basic = base64.b64encode(f"reader:{self.token}".encode()).decode()
        url = f"http://127.0.0.1:{self.http_port}/?{urllib.parse.urlencode({'query': query, 'database': 'spendfuse'})}"
        request = urllib.request.Request(url, headers={"Authorization": f"Basic {basic}"})
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 - the same
            rows: list[list[Any]] = json.loads(answer.read())["data"]
        return rows


def begin(part: ChildProcess) -> None:
    """Start a part, whatever it is."""
    if isinstance(part, WorkerProcess):
        part.begin()
    else:
        part.start()


async def _read(consumer: AIOKafkaConsumer, topic: str) -> list[Record]:
    cluster = await consumer._client.fetch_all_metadata()
    partitions = [TopicPartition(topic, number) for number in sorted(cluster.partitions_for_topic(topic) or ())]
    consumer.assign(partitions)
    ends = await consumer.end_offsets(partitions)
    for partition in partitions:
        consumer.seek(partition, (await consumer.beginning_offsets([partition]))[partition])
    records: list[Record] = []
    while [partition for partition, end in ends.items() if await consumer.position(partition) < end]:
        batches = await consumer.getmany(timeout_ms=200, max_records=5_000)
        records += [(raw.partition, raw.offset, raw.key, raw.value) for batch in batches.values() for raw in batch]
    return sorted(records, key=lambda record: record[:2])
