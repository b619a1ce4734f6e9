"""A Kafka that can be made to refuse, a worker on it, and a comparison with the raw topics when it has recovered."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiokafka import AIOKafkaConsumer

from chaos import stage
from chaos.load import SPACE, _usage
from chaos.oracle import Topics, judge
from kraft import KraftBroker, KraftUnavailableError, kraft_jars
from pipeline import scenario
from pipeline.samples import BOOK
from spendfuse.client.connection import consumer_options
from spendfuse.pipeline.topics import ensure_topics
from spendfuse.settings import BrokerSettings
from spendfuse.wire import Heartbeat, encode
from spendfuse.wire.topics import ALERTS, HEARTBEATS, USAGE
from workers import WorkerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

TOOL = Path(__file__).with_name("Refuse.java")
TOOL_DEADLINE_S = 60
DATA_MB = 96
STALE_LAG_S = 2
DEADLINE_S = 90.0


@contextmanager
def small_disk(directory: Path, mb: int, inodes: int = 100_000) -> Iterator[Path]:
    """Mount a file system of a few MB over a directory; raises OSError, with its reason, where that is not allowed."""
    directory.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mb}m,nr_inodes={inodes}", "tmpfs", str(directory)],
        capture_output=True, text=True, check=False, timeout=TOOL_DEADLINE_S,
    )  # fmt: skip
    if mounted.returncode:
        raise OSError(f"a small file system could not be mounted: {mounted.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=False, timeout=TOOL_DEADLINE_S)


def fill(directory: Path) -> Path:
    """Write into a small disk until it is full; return the file, whose removal makes room again."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue
    return filler


class RefusingKafka(KraftBroker):
    """Knows access rules; a second node keeps replicas and no votes; data lie on a small disk of their own, or not.

    A topic's `min.insync.replicas` beyond its replicas is taken for their number: a refusal needs one that is gone.
    """

    def __init__(self, nodes: int = 1, *, on_small_disk: bool = False) -> None:
        super().__init__(nodes)
        self._on_small_disk = on_small_disk

    @property
    def data(self) -> Path:
        return self._nodes[0].directory / "data"

    def refuse(self, *command: str) -> None:
        """Run `Refuse.java`, which see."""
        argv = ["java", "-cp", f"{kraft_jars()}{os.sep}*", str(TOOL), self.bootstrap_servers, *command]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=TOOL_DEADLINE_S)
        assert done.returncode == 0, done.stderr

    def _format(self) -> None:
        if self._on_small_disk:
            try:
                self._ending.enter_context(small_disk(self.data, DATA_MB))
            except OSError as error:
                raise KraftUnavailableError(str(error)) from error
        super()._format()

    def _server_properties(self, node: Any) -> str:
        more = {
            "metadata.log.dir": node.directory / "metadata",
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "allow.everyone.if.no.acl.found": "true",
        }
        first = self._nodes[0]
        more["controller.quorum.voters"] = f"{first.node_id}@127.0.0.1:{first.controller_port}"
        if node is not first:
            more["process.roles"] = "broker"
            more["listeners"] = f"BROKER://127.0.0.1:{node.port}"
        # The last of several lines of a name holds.
        return super()._server_properties(node) + "".join(f"{key}={value}\n" for key, value in more.items())


class Pressed:
    """A deployment under pressure: a worker, what was emitted, and what its heartbeats and alerts say."""

    def __init__(self, kafka: RefusingKafka, directory: Path, replication: int = 1) -> None:
        self.kafka = kafka
        first = kafka.bootstrap_servers.split(",")[0]  # the one that stays
        self.broker = BrokerSettings.from_env(
            {}, bootstrap_servers=first, session_timeout_ms=6_000, rebalance_timeout_ms=6_000,
            heartbeat_interval_ms=1_000,
        )  # fmt: skip
        self.deployed = scenario.Deployment(self.broker, directory)
        asyncio.run(ensure_topics(self.broker, partitions=scenario.PARTITIONS, replication=replication))
        book = directory / "book.json"
        book.write_bytes(encode(BOOK))
        self.env = {
            "SPENDFUSE_PRICE_BOOK_FILE": str(book),
            "SPENDFUSE_SIGNING_KEY": scenario.PRIVATE,
            "SPENDFUSE_REPLICATION": str(replication),
            "SPENDFUSE_PARTITIONS": str(scenario.PARTITIONS),
            "SPENDFUSE_STALE_LAG_S": str(STALE_LAG_S),
        }
        self.worker = WorkerProcess(directory, "worker", self.broker, self.env)
        self.sent = 0

    def run(self) -> None:
        """Have the worker run, if it does not."""
        if not self.worker.alive:
            self.worker.begin()
            self.worker.until_ready()

    async def emit(self, watch: scenario.Watch, count: int) -> None:
        """Emit calls, each until it is on the topic: what may have arrived is sent again, with the same id."""
        first, self.sent = self.sent, self.sent + count
        waiting = {number: json.dumps(_usage(number)).encode() for number in range(first, self.sent)}
        give_up_at = time.monotonic() + 2 * DEADLINE_S
        while waiting:
            assert time.monotonic() < give_up_at, "the broker takes no usage"
            sends = [
                watch.producer.send_and_wait(USAGE.name, value, partition=number % scenario.PARTITIONS)
                for number, value in waiting.items()
            ]
            done = zip(list(waiting), await asyncio.gather(*sends, return_exceptions=True), strict=True)
            for number, answer in done:
                if not isinstance(answer, Exception):
                    del waiting[number]

    async def exact(self, watch: scenario.Watch) -> None:
        """Wait until everything emitted is charged and the worker is live; compare all that is stored with it."""
        await watch.until(lambda: len(watch.charges(SPACE)) >= self.sent, "the last charge", DEADLINE_S)
        await watch.until(lambda: live(beats(watch)[-1]), "a heartbeat that is live again", DEADLINE_S)
        give_up_at = time.monotonic() + DEADLINE_S
        while differences := await self._differences():  # a rollup's sum is stored a little later than it is charged
            assert time.monotonic() < give_up_at, "\n".join(differences)
            await asyncio.sleep(0.2)

    async def _differences(self) -> list[str]:
        consumer = AIOKafkaConsumer(**consumer_options(self.broker, "oracle"))
        await consumer.start()
        try:
            topics = Topics(**{field: await stage._read(consumer, topic) for field, topic in stage.TOPICS.items()})
        finally:
            await consumer.stop()
        verdict = judge(topics, encode(BOOK))
        assert verdict.truth.calls == self.sent, "what the test emitted is not what the topic holds"
        return verdict.differences


def beats(watch: scenario.Watch, since: int = 0) -> list[Heartbeat]:
    return [Heartbeat.model_validate_json(record.value or b"") for record in watch.records[HEARTBEATS.name][since:]]


def live(beat: Heartbeat) -> bool:
    """Say whether a guard takes a heartbeat for a sign of life."""
    return beat.ready and not beat.stale


def lag_alerts(watch: scenario.Watch) -> list[dict[str, Any]]:
    told = [json.loads(record.value or b"") for record in watch.records[ALERTS.name]]
    return [alert for alert in told if alert["kind"] == "lag"]
