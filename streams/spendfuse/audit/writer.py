"""The writer: the ledger topic into ClickHouse, each entry once, whatever is killed in between.

The order is the whole secret: the batch's header to Kafka, its rows and then its own row to ClickHouse, the offset.
Whoever takes a partition over forms the last header's batch again and inserts it under the same tokens, which changes
nothing when the rows were in, and completes them when some were not.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from typing import Final

import structlog
from aiokafka import AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import IllegalStateError, KafkaError
from aiokafka.structs import ConsumerRecord

from spendfuse.audit import headers, operator, trail
from spendfuse.audit.batches import Batch, BatchHeader, BatchMismatchError, Collector, Message, form_again
from spendfuse.audit.checkpoints import Head
from spendfuse.audit.database import Database
from spendfuse.audit.lag import GROUP
from spendfuse.audit.trail import TrailError
from spendfuse.client.connection import Consumer, admin_options, close, consumer_options, producer_options
from spendfuse.settings import BrokerSettings
from spendfuse.wire.topics import BATCHES, CHECKPOINTS, LEDGER

CLIENT_ID: Final = "spendfuse-audit"
MESSAGES_PER_POLL: Final = 50
POLL_MS_MAX: Final = 200
OPEN_BYTES_MAX: Final = 67_108_864
"""Most bytes of ledger messages in all open batches together; beyond it they are written at once."""
RETRY_S_MIN: Final = 0.1
RETRY_S_MAX: Final = 30.0
CHECKPOINT_S: Final = 300.0
CHECKPOINT_SEND_S_MAX: Final = 5.0
"""A topic that is not there, or a broker that is slow, may not hold the ledger up for longer."""
REREAD_TIMEOUT_S: Final = 60.0
POLL_INTERVAL_MS_MAX: Final = 86_400_000
"""A writer that waits for ClickHouse keeps its partitions: another one would have to wait just the same."""

_log = structlog.get_logger(__name__)


class _PartitionLostError(Exception):
    """A rebalance took the partition away: whoever has it now goes on from the last header."""


class _StoppedError(Exception):
    """The writer is to stop while it waits."""


class _Lane:
    """One assigned ledger partition: its open batch, since when it is open, and the last batch that is in."""

    def __init__(self, collector: Collector, epoch: int) -> None:
        self.collector = collector
        self.epoch = epoch
        self.due_at = 0.0
        self.head = Head(collector.partition, collector.seq - 1, collector.link)


class LedgerWriter(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka ships no types
    """Writes the ledger into a database; the topics and the group have other names in tests only."""

    def __init__(
        self,
        broker: BrokerSettings,
        database: Database,
        *,
        rows_max: int,
        wait_ms: int,
        checkpoint: Callable[[Sequence[Head]], str] | None = None,
        checkpoint_s: float = CHECKPOINT_S,
        said: Sequence[bytes] = (),
        ledger: str = LEDGER.name,
        batches: str = BATCHES.name,
        checkpoints: str = CHECKPOINTS.name,
        group: str = GROUP,
    ) -> None:
        """Take the settings; `checkpoint` keeps a signed note of some heads and returns it, to be sent as well.

        `said` are messages for the ledger itself, of what was done to the database before this.
        """
        self._broker = broker
        self._database = database
        self._rows_max = rows_max
        self._wait_s = wait_ms / 1_000
        self._checkpoint = checkpoint
        self._checkpoint_s = checkpoint_s
        self._checkpoint_due_at = 0.0
        self._checked: Sequence[Head] = ()
        self._note = ""
        self._said = list(said)
        self._checkpoints = checkpoints
        self._ledger = ledger
        self._batches = batches
        self._group = group
        self._stop = asyncio.Event()
        # None while a rebalance is under way: until it has ended nothing may be written for any partition.
        self._assigned: frozenset[TopicPartition] | None = None
        self._lanes: dict[TopicPartition, _Lane] = {}
        self._epoch = 0
        # Held while a header is on its way: a partition is not given away before its header has landed or failed.
        self._header_sent = asyncio.Lock()
        self._consumer: Consumer
        self._producer: AIOKafkaProducer

    def stop(self) -> None:
        """Ask `run` to write what it holds, once, and return."""
        self._stop.set()

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Write until stopped; `ready` is called once all assigned partitions have been taken over.

        Kafka and ClickHouse may come and go: it waits. Raises TrailError when going on would falsify the trail.
        """
        delay_s = RETRY_S_MIN
        while not self._stop.is_set():
            try:
                async with self._connected():
                    await self._write_ledger(ready)
            except (KafkaError, OSError, TimeoutError) as error:
                _log.warning("the audit waits for Kafka", error=str(error), retry_s=delay_s)
                with contextlib.suppress(_StoppedError):
                    await self._pause(delay_s)
                delay_s = min(delay_s * 2, RETRY_S_MAX)

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:  # noqa: ARG002 - aiokafka's
        """Drop the open batches: without a header nothing has happened to their messages."""
        async with self._header_sent:
            self._let_go()

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """Leave it to the round to take them over."""
        self._let_go()
        self._assigned = frozenset(assigned)
        _log.info("ledger partitions", partitions=sorted(part.partition for part in assigned))

    def _let_go(self) -> None:
        self._epoch += 1
        self._assigned = None
        self._lanes.clear()

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[None]:
        await self._wait_for_topics()
        self._producer = AIOKafkaProducer(**producer_options(self._broker, CLIENT_ID))
        self._consumer = Consumer(
            **consumer_options(self._broker, CLIENT_ID),
            group_id=self._group,
            max_poll_interval_ms=POLL_INTERVAL_MS_MAX,
        )
        self._consumer.subscribe([self._ledger], listener=self)
        try:
            await self._producer.start()
            await self._consumer.start()
            while self._said:
                await self._producer.send_and_wait(self._ledger, self._said[0], key=operator.KEY)
                del self._said[0]
            yield
        finally:
            await close(self._consumer)
            await close(self._producer)
            self._let_go()

    async def _wait_for_topics(self) -> None:
        """Wait until the topics exist: a consumer that asks for one may create it, with settings nobody chose."""
        admin = AIOKafkaAdminClient(**admin_options(self._broker, CLIENT_ID))
        await admin.start()
        try:
            delay_s = RETRY_S_MIN
            while missing := {self._ledger, self._batches} - set(await admin.list_topics()):
                _log.info("the audit waits for topics to be created", missing=sorted(missing))
                await self._pause(delay_s)
                delay_s = min(delay_s * 2, RETRY_S_MAX)
        except _StoppedError:
            pass
        finally:
            await admin.close()

    async def _write_ledger(self, ready: Callable[[], None]) -> None:
        while not self._stop.is_set():
            try:
                if await self._take_over():
                    ready()
                await self._round()
                if asyncio.get_running_loop().time() >= self._checkpoint_due_at:
                    await self._say_where()
            except (_PartitionLostError, IllegalStateError):
                _log.info("a rebalance took a ledger partition away")
            except _StoppedError:
                return
        for part in list(self._lanes):
            with contextlib.suppress(_PartitionLostError, _StoppedError, IllegalStateError):
                await self._write(part)
        await self._say_where()

    async def _round(self) -> None:
        """Read once, and write each partition whose batch is full or has waited long enough."""
        loop = asyncio.get_running_loop()
        if not self._lanes:
            await self._pause(POLL_MS_MAX / 1_000)
            return
        waits = [lane.due_at - loop.time() for lane in self._lanes.values() if len(lane.collector)]
        timeout_ms = int(min(max(min(waits, default=1.0), 0.0) * 1_000, POLL_MS_MAX))
        epoch = self._epoch
        records = await self._consumer.getmany(*self._lanes, timeout_ms=timeout_ms, max_records=MESSAGES_PER_POLL)
        if epoch != self._epoch:
            raise _PartitionLostError
        for part, messages in records.items():
            for record in messages:
                await self._collect(part, record)
        crowded = sum(lane.collector.size_bytes for lane in self._lanes.values()) > OPEN_BYTES_MAX
        for part, lane in list(self._lanes.items()):
            if len(lane.collector) and (crowded or lane.collector.is_full or lane.due_at <= loop.time()):
                await self._write(part)

    async def _collect(self, part: TopicPartition, record: ConsumerRecord) -> None:
        lane = self._lane(part)
        message = Message(record.offset, record.timestamp, record.value)
        if not len(lane.collector):
            lane.due_at = asyncio.get_running_loop().time() + self._wait_s
        if not lane.collector.add(message):
            await self._write(part)
            lane.due_at = asyncio.get_running_loop().time() + self._wait_s
            lane.collector.add(message)

    def _lane(self, part: TopicPartition) -> _Lane:
        lane = self._lanes.get(part)
        if lane is None:
            raise _PartitionLostError
        return lane

    async def _write(self, part: TopicPartition) -> None:
        """Seal the open batch and bring it home: header, rows, own row, offset."""
        lane = self._lane(part)
        if not len(lane.collector):
            return
        batch = await asyncio.to_thread(lane.collector.seal)
        async with self._header_sent:
            self._check(lane.epoch)
            await headers.append(self._producer, self._batches, batch.header)
        await self._store(lane.epoch, batch)
        lane.head = Head(batch.header.partition, batch.header.seq, batch.header.link)
        await self._commit(part, batch.header)

    async def _say_where(self) -> None:
        """Publish a checkpoint of the partitions this writer has, from its own memory and not from the database."""
        self._checkpoint_due_at = asyncio.get_running_loop().time() + self._checkpoint_s
        heads = sorted(lane.head for lane in self._lanes.values() if lane.head.seq)
        if self._checkpoint is None:
            return
        try:
            if heads and heads != self._checked:
                self._note = await asyncio.to_thread(self._checkpoint, heads)
                self._checked = heads
                _log.info("checkpoint", partitions=len(heads), batches=sum(head.seq for head in heads))
            if self._note:
                key = self._note.partition("\n")[0].encode()
                sent = self._producer.send_and_wait(self._checkpoints, self._note.encode(), key=key)
                await asyncio.wait_for(sent, CHECKPOINT_SEND_S_MAX)
                self._note = ""
        except (KafkaError, OSError) as error:
            _log.warning(
                "a checkpoint was not kept or not published; it is tried again. Does its topic exist "
                "(spendfuse topics create)?",
                topic=self._checkpoints, error=str(error) or type(error).__name__,
            )  # fmt: skip

    async def _store(self, epoch: int, batch: Batch) -> None:
        async def insert() -> None:
            await asyncio.to_thread(trail.store, self._database, batch)

        await self._until_done(insert, epoch, "ClickHouse does not take a batch; it is tried again, unchanged")
        header = batch.header
        _log.debug("batch written", partition=header.partition, seq=header.seq, rows=header.rows)

    async def _commit(self, part: TopicPartition, header: BatchHeader) -> None:
        # Only for who watches the lag: where to go on is in the header.
        try:
            await self._consumer.commit({part: header.last_offset + 1})
        except KafkaError as error:
            _log.info("the offset of a written batch was not committed", partition=header.partition, error=str(error))

    async def _take_over(self) -> bool:
        """Take over every assigned partition that has no lane yet; False while a rebalance is under way."""
        epoch = self._epoch
        if self._assigned is None:
            return False
        new = self._assigned - set(self._lanes)
        if not new:
            return True
        last = await headers.last_headers(self._broker, self._batches, [part.partition for part in new])
        for part in sorted(new):
            header = last.get(part.partition)
            committed = await self._consumer.committed(part)
            start = await self._ask_start(epoch, part, header, committed)
            if start.note:
                _log.warning(start.note, partition=part.partition)
            if start.repeat is None:
                self._check(epoch)
                await self._consumer.seek_to_beginning(part)
            else:
                await self._repeat(epoch, part, start.repeat)
            marks = start.repeat.marks_after if start.repeat else {}
            self._check(epoch)
            collector = Collector(
                self._ledger, part.partition, start.generation, start.seq, marks, self._rows_max, link=start.link
            )
            self._lanes[part] = _Lane(collector, epoch)
        return True

    async def _ask_start(
        self, epoch: int, part: TopicPartition, header: BatchHeader | None, committed: int | None
    ) -> trail.Start:
        answer: list[trail.Start] = []

        async def ask() -> None:
            start = await asyncio.to_thread(trail.where_to_start, self._database, part.partition, header, committed)
            answer.append(start)

        await self._until_done(ask, epoch, "ClickHouse does not say where a partition stands")
        return answer[-1]

    async def _repeat(self, epoch: int, part: TopicPartition, header: BatchHeader) -> None:
        """Insert the last header's batch once more, and stand behind it."""
        messages = await self._read_again(epoch, part, header)
        if messages is None:
            _log.error(
                "the ledger has expired under the last batch: it cannot be completed if it was cut short",
                partition=header.partition, first_offset=header.first_offset, last_offset=header.last_offset,
            )  # fmt: skip
        else:
            try:
                batch = await asyncio.to_thread(form_again, self._ledger, header, messages)
            except BatchMismatchError as error:
                raise TrailError(
                    f"{error}. Was the topic {self._ledger} created anew? Then delete {self._batches} as well, "
                    "and point the audit at a new database, or the same to go on in it"
                ) from error
            await self._store(epoch, batch)
            await self._commit(part, header)
            _log.info("batch inserted again after a restart", partition=header.partition, seq=header.seq)
        self._check(epoch)
        self._consumer.seek(part, header.last_offset + 1)

    async def _read_again(self, epoch: int, part: TopicPartition, header: BatchHeader) -> list[Message] | None:
        """Return the ledger messages of a header; None when retention has taken the first of them."""
        if (await self._consumer.beginning_offsets([part]))[part] > header.first_offset:
            return None
        self._check(epoch)
        self._consumer.seek(part, header.first_offset)
        messages: list[Message] = []
        deadline = asyncio.get_running_loop().time() + REREAD_TIMEOUT_S
        while not messages or messages[-1].offset < header.last_offset:
            if asyncio.get_running_loop().time() > deadline:
                raise TrailError(
                    f"ledger partition {part.partition} has no offset {header.last_offset}, where batch {header.seq} "
                    f"ends. Was the topic {self._ledger} created anew? Then delete {self._batches} as well"
                )
            records = await self._consumer.getmany(part, timeout_ms=POLL_MS_MAX, max_records=MESSAGES_PER_POLL)
            self._check(epoch)
            messages += [Message(record.offset, record.timestamp, record.value) for record in records.get(part, ())]
            if self._stop.is_set():
                raise _StoppedError
        return messages

    def _check(self, epoch: int) -> None:
        if epoch != self._epoch:
            raise _PartitionLostError

    async def _until_done(self, step: Callable[[], Awaitable[None]], epoch: int, problem: str) -> None:
        """Repeat a step until it succeeds, the partition is lost or the writer is stopped; nothing is ever dropped."""
        delay_s = RETRY_S_MIN
        while True:
            try:
                await step()
            except TrailError:
                raise
            except Exception as error:  # noqa: BLE001 - a driver raises many kinds; every one of them means: not yet
                _log.warning(problem, error=str(error)[:500], retry_s=delay_s)
            else:
                return
            self._check(epoch)
            await self._pause(delay_s)
            self._check(epoch)
            delay_s = min(delay_s * 2, RETRY_S_MAX)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)
        if self._stop.is_set():
            raise _StoppedError
