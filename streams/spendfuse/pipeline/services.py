"""The worker's own Kafka ends, beside Faust: one producer, the intake's and the recorder's consumers, the followers.

A Kafka message through a Faust stream costs about 50 times what `getmany` costs (design.md section 2), so only the
agents that keep state are Faust's.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog
from aiokafka import ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError
from aiokafka.structs import ConsumerRecord

from spendfuse import __version__
from spendfuse.audit.lag import LedgerLag, ledger_lag
from spendfuse.client.clock import Clock
from spendfuse.client.connection import Consumer, close, consumer_options
from spendfuse.client.follow import Follower, Record
from spendfuse.pipeline import recorder
from spendfuse.pipeline.feed import PolicyFeed
from spendfuse.pipeline.intake import Limits, rounds
from spendfuse.pipeline.lag import SECOND_US, Reading, Staleness, lag_alert
from spendfuse.pipeline.outbox import KafkaOutbox
from spendfuse.pipeline.publish import Publisher
from spendfuse.pipeline.recorder import RECORDED
from spendfuse.pipeline.records import SourceRecord
from spendfuse.pipeline.register import Register
from spendfuse.pipeline.trail_watch import TrailLag, trail_alert, watch
from spendfuse.settings import BrokerSettings, WorkerSettings
from spendfuse.wire.base import from_us
from spendfuse.wire.control import Alert, Heartbeat
from spendfuse.wire.topics import ALERTS, BUDGETS, COMMANDS, PRICES, USAGE

INTAKE_RECORDS_MAX: Final = 2_000
RECORDER_RECORDS_MAX: Final = 500
CURRENT_S_MAX: Final = 5.0
"""Longest that a worker which could begin waits to be current before it says that it is ready."""
LOOK_S: Final = 0.05
POLL_MS: Final = 200
COMMIT_INTERVAL_S: Final = 1.0
LEAVE_S_MAX: Final = 3.0
"""Longest that a worker which is told to stop waits for the end of what it handles, and to leave a group."""
NS_PER_US: Final = 1_000
NS_PER_MS: Final = 1_000_000

log: Any = structlog.get_logger("spendfuse.worker")


@dataclass(slots=True)
class IntakeCounters:
    """What the intake has done since it started; `lag` is in records of `usage.v1`."""

    usages: int = 0
    rejected: int = 0
    lag: int = 0


class _Joined(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka ships no types
    """Says when a consumer has its first assignment, and whether its group rebalances."""

    def __init__(self, joined: asyncio.Event) -> None:
        self._joined = joined
        self.rebalancing = True

    async def on_partitions_revoked(self, revoked: Any) -> None:  # noqa: ARG002 - the listener's signature
        """Commit nothing: what was handled and not committed is handled again by the next owner."""
        self.rebalancing = True

    async def on_partitions_assigned(self, assigned: Any) -> None:  # noqa: ARG002 - the same
        """Say so."""
        self.rebalancing = False
        self._joined.set()


class GroupReader:
    """A consumer in a group that hands over batches and commits what was handled, at most once a second.

    Handling must bear a replay: an offset may be committed late, never early.
    """

    def __init__(self, broker: BrokerSettings, topics: Sequence[str], group: str, records_max: int) -> None:
        """Take what to read; `run` reads until it is cancelled."""
        self._broker = broker
        self._group = group
        self._consumer: Consumer | None = None
        self._records_max = records_max
        self.joined = asyncio.Event()
        self._listener = _Joined(self.joined)
        self._topics = list(topics)
        self._committed_at = 0.0
        self._polling: asyncio.Future[Any] | None = None
        self._ending = False
        self._left = asyncio.Event()
        self._left.set()
        self._in_hand: dict[TopicPartition, int] = {}

    async def run(self, handle: Callable[[list[list[ConsumerRecord]]], Any]) -> None:
        """Read, handle (what was read, by partition), commit, until `leave`."""
        consumer = Consumer(group_id=self._group, **consumer_options(self._broker, self._group))
        consumer.subscribe(self._topics, listener=self._listener)
        self._left.clear()
        try:
            await consumer.start()
            self._consumer = consumer
            while not self._ending:
                batches = await self._poll(consumer)
                if batches:
                    self._in_hand = {place: records[0].offset for place, records in batches.items()}
                    await handle(list(batches.values()))
                    self._in_hand = {}
                await self._commit(consumer)
        finally:
            self._consumer = None
            # Cancelled half-way, it would leave the group waiting for a member that is gone, for a whole session.
            await asyncio.shield(asyncio.ensure_future(self._stop(consumer)))

    async def _poll(self, consumer: Consumer) -> dict[Any, list[ConsumerRecord]]:
        """Return what there is to be read; nothing when `leave` was called meanwhile."""
        self._polling = asyncio.ensure_future(consumer.getmany(timeout_ms=POLL_MS, max_records=self._records_max))
        try:
            batches: dict[Any, list[ConsumerRecord]] = await self._polling
        except asyncio.CancelledError:
            if not self._ending:
                raise
            return {}
        return batches

    async def _stop(self, consumer: Consumer) -> None:
        try:
            await close(consumer)
        finally:
            self._left.set()

    async def leave(self) -> None:
        """Finish what is being handled, commit it and leave the group, so that nobody waits for a session to run out.

        After `LEAVE_S_MAX` seconds it returns all the same.
        """
        self._ending = True
        if self._polling is not None:
            self._polling.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_S_MAX):
                await self._left.wait()

    async def _commit(self, consumer: Consumer) -> None:
        now = asyncio.get_running_loop().time()
        # In a rebalance the broker would refuse, and aiokafka would join once more after it.
        if self._listener.rebalancing or not (self._ending or now - self._committed_at >= COMMIT_INTERVAL_S):
            return
        self._committed_at = now
        # A rebalance in between makes the commit someone else's: the records come again, and change nothing.
        with contextlib.suppress(CommitFailedError, IllegalStateError):
            await consumer.commit()

    def owns(self, topic: str, partition: int) -> bool:
        """Say whether a partition is assigned to this reader now."""
        return self._consumer is not None and TopicPartition(topic, partition) in self._consumer.assignment()

    def reading(self) -> Reading:
        """Return what of the partitions owned has been handled, and where they end."""
        position = total = 0
        is_known = True
        consumer = self._consumer
        if consumer is None:
            return Reading(None, 0, 0, is_known=False)
        owned = frozenset(consumer.assignment())
        for partition in owned:
            end = consumer.highwater(partition)
            assignment = consumer._subscription.subscription.assignment  # noqa: SLF001 - no public, synchronous position
            state = assignment.state_value(partition) if assignment else None
            if end is None or state is None or not state.has_valid_position:
                is_known = False
                continue
            # What is in hand is read and not done: its sends may be refused.
            position += min(state.position, self._in_hand.get(partition, state.position))
            total += max(end, state.position)
        return Reading(owned, position, total, is_known)


def _wall_ms() -> int:
    """Return the machine's time in ms: Kafka's stamps are the wall's, whatever clock usage is judged by."""
    return time.time_ns() // NS_PER_MS


def source_record(record: ConsumerRecord) -> SourceRecord:
    """Return a Kafka record as the stages see it."""
    return SourceRecord(
        record.topic,
        record.partition,
        record.offset,
        record.timestamp or -1,
        record.key,
        record.value,
        headers=tuple(record.headers),
    )


class Services:
    """All that runs beside the agents: start, ready, and an orderly end. A failure of any ends the worker."""

    def __init__(
        self,
        *,
        broker: BrokerSettings,
        settings: WorkerSettings,
        outbox: KafkaOutbox,
        publisher: Publisher,
        signs: KafkaOutbox,
        sign: Publisher,
        feed: PolicyFeed,
        clock: Clock,
        emitter: str,
        register: Register,
    ) -> None:
        """Take the ports and settings; `sign` publishes heartbeats over `signs`, which nothing else waits in."""
        self.informed = asyncio.Event()
        self.ready = asyncio.Event()
        self.counters = IntakeCounters()
        self.budgets_changed = asyncio.Event()
        self.is_live: Callable[[], bool] = lambda: True
        self.on_ready: Callable[[], None] = lambda: None
        self.refuse: Callable[[str], None] = lambda _: None
        self._broker = broker
        self._settings = settings
        self._outbox = outbox
        self._publisher = publisher
        self._signs = signs
        self._sign = sign
        self.first: dict[tuple[str, int], int] = {}
        self._untold: Alert | None = None
        self._feed = feed
        self._clock = clock
        self._emitter = emitter
        self._followers: list[Follower] = []
        self._register = register
        self._intake = GroupReader(broker, [USAGE.name], f"{settings.app_id}-intake", INTAKE_RECORDS_MAX)
        self._recorder = GroupReader(
            broker, [topic.name for topic in RECORDED], f"{settings.app_id}-recorder", RECORDER_RECORDS_MAX
        )
        self.readings: Callable[[], dict[str, Reading]] = dict
        self._staleness = Staleness(settings.stale_lag_s * SECOND_US)
        self._limits = Limits(settings.usage_age_max_s * 1_000_000, settings.usage_ahead_max_s * 1_000_000)

    async def start(self) -> None:
        """Connect, and read budgets and prices to their end: only then may anything be decided."""
        await self._outbox.start()
        await self._signs.start()
        self._feed.on_change = self.budgets_changed.set
        self._followers = [
            Follower(self._broker, BUDGETS.name, self._on_budget, client_id="spendfuse-budgets"),
            Follower(self._broker, PRICES.name, self._on_price, client_id="spendfuse-prices"),
            Follower(self._broker, COMMANDS.name, self._register.follow, client_id="spendfuse-register"),
        ]
        for follower in self._followers:
            follower.start()
        for follower in self._followers:
            await follower.caught_up()
        self.budgets_changed.set()  # a budget may have changed while no worker ran
        await self._sign_again()
        self.informed.set()

    async def _sign_again(self) -> None:
        """Put our signature to what holds and is signed by a key that is being retired."""
        kept = list(self._register.to_sign_again(self._clock()))
        await asyncio.gather(*[await self._publisher.again(each, sign=True) for each in kept])
        if kept:
            log.info("signed again", commands=len(kept))

    async def stop(self) -> None:
        """Leave the groups, then close what `start` opened."""
        self._set_ready_file(present=False)
        await asyncio.gather(self._intake.leave(), self._recorder.leave())
        for follower in self._followers:
            await follower.stop()
        await self._signs.stop()
        await self._outbox.stop()

    async def intake(self) -> None:
        """Read `usage.v1` for ever."""
        await self._intake.run(self._take_in)

    async def announce(self) -> None:
        """Say that the worker is ready: tables recovered, budgets read, its share of the intake assigned.

        It waits a moment for what lay there to be done, so that who waits for it finds it live; a backlog takes longer.
        """
        await self.informed.wait()
        await self._intake.joined.wait()
        await self._until_current(CURRENT_S_MAX)
        self.ready.set()
        self.on_ready()
        log.info("ready", budgets=len(self._feed.policies.budgets), price_book=self._feed.book.version)
        self._set_ready_file(present=True)

    async def _take_in(self, batches: list[list[ConsumerRecord]]) -> None:
        # Of all partitions together: a round waits for its acknowledgements, so one for each would wait so many times.
        sources = [source_record(record) for records in batches for record in records]
        now_us = self._clock()
        for each in rounds(sources, self._settings.partitions, self._limits, now_us, self._register.correction):
            sent = await self._publisher.round(each, self._emitter, now_us)
            await asyncio.gather(*sent)  # all acknowledged before the next round is sent; a failure ends the process
            self.counters.usages += each.usages
            self.counters.rejected += len(each.dead)

    async def recorder(self) -> None:
        """Copy control records into the ledger for ever."""
        await self._recorder.run(self._record)

    async def _record(self, batches: list[list[ConsumerRecord]]) -> None:
        for records in batches:
            sources = [source_record(record) for record in records]
            deliveries, refused = await recorder.record(
                sources, self._publisher, self._settings.partitions, self._clock(), self._register
            )
            await asyncio.gather(*deliveries)
            for source, fault in refused:
                log.warning("refused", topic=source.topic, offset=source.offset, reason=fault)

    async def heartbeats(self) -> None:
        """Give a sign of life for ever."""
        beat_us = 0
        while True:
            self._observe_lag()
            beat_us = max(beat_us + 1, self._clock())  # a guard takes an earlier one for a repetition
            beat = Heartbeat(
                emitter=self._emitter,
                ts=from_us(beat_us),
                ready=self.ready.is_set() and self.is_live() and self._staleness.is_current,
                version=__version__,
                price_book=self._feed.book.version,
                budgets=len(self._feed.policies.budgets),
                lag=self.counters.lag,
                stale=self._staleness.stale,
            )
            with contextlib.suppress(KafkaError):  # the agents' own sends decide whether a broker's absence is fatal
                await (await self._sign.heartbeat(beat))
            if self._untold is not None:
                with contextlib.suppress(KafkaError):  # it is told with the next heartbeat
                    await (await self._sign.alert(self._untold))
                    self._untold = None
            if beat.ready:
                await asyncio.sleep(self._settings.heartbeat_s)
            else:
                await self._until_current(self._settings.heartbeat_s, self.ready)

    async def _until_current(self, within_s: float, ready: asyncio.Event | None = None) -> None:
        """Return once what lay in the worker's partitions is done (and it is ready), or after so many seconds."""
        give_up_at = time.monotonic() + within_s
        while (left_s := give_up_at - time.monotonic()) > 0:
            self._observe_lag()
            if self._staleness.is_current and self.is_live() and (ready is None or ready.is_set()):
                return
            await asyncio.sleep(min(LOOK_S, left_s))

    def _observe_lag(self) -> None:
        """Measure how far the stages are behind; say when that becomes too far, and when it is over."""
        stages = {"intake": self._intake.reading(), **self.readings()}
        self.counters.lag = stages["intake"].records
        # Time passes here as on the wall, whatever clock usage is judged by.
        turned = self._staleness.observe(stages, time.monotonic_ns() // NS_PER_US)
        if turned is None:
            return
        records = sum(reading.records for reading in stages.values())
        self._untold = lag_alert(self._emitter, self._staleness.lag_us, records, self._clock(), over=not turned)
        log.warning("stale" if turned else "live again", lag_s=self._staleness.lag_us // SECOND_US, records=records)

    async def watch_trail(self) -> None:
        """Say for ever when the audit falls too far behind the ledger, and when it has caught up."""
        await self.ready.wait()
        await watch(
            TrailLag(self._settings.audit_lag_s),
            lambda: ledger_lag(self._broker),
            is_mine=lambda: self._recorder.owns(ALERTS.name, 0),
            tell=self._tell_trail,
            now_ms=_wall_ms,
        )

    async def _tell_trail(self, lag: LedgerLag, over: bool) -> None:
        await (await self._publisher.alert(trail_alert(lag, _wall_ms(), self._clock(), over=over)))

    def _on_budget(self, record: Record) -> None:
        refused = self._feed.budget_record(record.key, record.value)
        if refused is not None:
            log.warning("budget refused", offset=record.offset, reason=refused)

    def _on_price(self, record: Record) -> None:
        refused = self._feed.price_record(record.key, record.value)
        if refused is not None:
            log.warning("price refused", offset=record.offset, reason=refused)

    def _set_ready_file(self, *, present: bool) -> None:
        if self._settings.ready_file:
            path = Path(self._settings.ready_file)
            if not present:
                path.unlink(missing_ok=True)
                return
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            except OSError as error:  # whoever waits for the file takes us for unready, and heartbeats say better
                log.error("ready file not written", path=str(path), reason=str(error))  # noqa: TRY400 - one sentence
