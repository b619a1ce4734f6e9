"""The tables written anew: what a rebuild reads and folds (`prepare_...`), and what it then writes (`write`).

Two cases, and how watermarks are set in each:

- **The changelogs are lost, the topics are not** (from the ledger). A charge of the ledger has its origin in
  `usage.v1`, and the ledger is a prefix of what was taken in, per packed partition and origin. So the watermark of a
  key is the last origin the ledger has of it, ids keep their origins, and shares are as of the packed message they came
  with. What lies beyond is folded as usual; what comes again is known.
- **Kafka is lost** (from ClickHouse). New topics begin at offset 0, where an old watermark would bury new usage. So
  sums, fuses and ids are taken over, watermarks are not, and the ids get an origin that no record can have: an
  emitter's spool, sent again into the new Kafka, is a duplicate. Budgets, prices and the latest commands are written
  back too.

While it writes, a mark in a topic of the app keeps workers from starting; a rebuild that was killed is run again.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from aiokafka import TopicPartition

from spendfuse.audit.queries import load
from spendfuse.client.accept import Refused, accept
from spendfuse.client.clock import Clock
from spendfuse.client.connection import Consumer, consumer_options
from spendfuse.client.follow import Record
from spendfuse.client.keys import Verifier
from spendfuse.engine.fuses import SEQ_KEPT_US
from spendfuse.engine.idle import bound_us
from spendfuse.engine.rebuilt import Rebuilt
from spendfuse.pipeline.feed import PolicyFeed, price_book_of
from spendfuse.pipeline.genuine import signer_of, verifier_of
from spendfuse.pipeline.rebuild_mark import RebuildMark, Source, mark_topic, read_mark
from spendfuse.pipeline.rebuild_sources import TrailReader, fold_ledger, fold_trail, last_batches, trail_commands
from spendfuse.pipeline.refusal import Ends, KafkaEnds, StateMismatchError, end_of, stop
from spendfuse.pipeline.routing import partition_of
from spendfuse.settings import BrokerSettings, SettingsError, WorkerSettings
from spendfuse.wire.base import to_us
from spendfuse.wire.control import Command
from spendfuse.wire.topics import BUDGETS, COMMANDS, LEDGER, PACKED, PRICES, USAGE, Topic

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CLIENT_ID: Final = "spendfuse-rebuild"
READ_MS: Final = 500
READ_RECORDS_MAX: Final = 2_000
ANSWER_S: Final = 30.0
Progress = Callable[[str, int, int], None]
"""What is being done, how much of it is done, and of how much."""
Given = tuple[bytes, bytes]
"""Key and value of a record to write back."""


class RebuildError(Exception):
    """A rebuild that cannot be made as things are; the message says why, and what to do."""


@dataclass(slots=True)
class Prepared:
    """What a rebuild has folded and would write; `former` as in `RebuildMark`, `ends` of what was read, by topic."""

    source: Source
    rebuilt: Rebuilt
    at_us: int
    unreadable: int = 0
    former: dict[int, int] = field(default_factory=dict)
    former_us: int = 0
    ends: dict[str, dict[int, int]] = field(default_factory=dict)
    commands: list[Command] = field(default_factory=list)
    budgets: list[Given] = field(default_factory=list)
    prices: list[Given] = field(default_factory=list)

    def mark(self, phase: Any) -> RebuildMark:
        """Return the mark of this rebuild."""
        return RebuildMark(
            phase=phase, source=self.source, at_us=self.at_us, former=self.former, former_us=self.former_us
        )


@dataclass(slots=True)
class _Known:
    """What the control topics hold: policies in force, and the latest genuine command of each key."""

    feed: PolicyFeed
    mark: RebuildMark | None
    budgets: int = 0
    prices: int = 0
    commands: dict[bytes, Command] = field(default_factory=dict)


async def prepare_from_ledger(
    broker: BrokerSettings, settings: WorkerSettings, clock: Clock, progress: Progress
) -> Prepared:
    """Fold `ledger.v1` and `commands.v1`.

    Raises RebuildError, SettingsError, or a `KafkaError` when the broker is away.
    """
    async with reading(broker) as consumer:
        known = await _known(consumer, settings, progress)
        if known.mark is not None and known.mark.former_us:
            raise RebuildError(
                "this Kafka took sums over from the trail of another one, and its ledger does not hold them: "
                "run `spendfuse state rebuild --from clickhouse`, which reads both"
            )
        prepared = Prepared("ledger", _empty(settings, known.feed), clock())
        await _fold_topic(consumer, settings, prepared, progress)
    if not prepared.rebuilt.tally.charges:
        raise RebuildError(
            f"{LEDGER.name} holds no charge: there is nothing to rebuild from. "
            "If Kafka was lost and ClickHouse was not, run `spendfuse state rebuild --from clickhouse`"
        )
    await _check_ends(broker, prepared.rebuilt)
    _finish(prepared, known, clock())
    return prepared


async def prepare_from_trail(
    broker: BrokerSettings, settings: WorkerSettings, clock: Clock, client: TrailReader, progress: Progress
) -> Prepared:
    """Fold the trail of a Kafka that is lost, and what the new one's ledger holds if it was taken over before.

    Raises RebuildError, SettingsError, or a `KafkaError` when the broker is away; what the database raises passes.
    """
    signer_of(settings)  # said now rather than after an hour of reading
    async with reading(broker) as consumer:
        known = await _known(consumer, settings, progress)
        again = known.mark is not None and bool(known.mark.former_us)
        if not again:
            await check_nothing_counted(consumer, settings.partitions)
        now_us = clock()
        budgets, prices = await asyncio.to_thread(_trail_policies, client, known)
        prepared = Prepared("clickhouse", _empty(settings, known.feed), now_us, budgets=budgets, prices=prices)
        if again and known.mark is not None:
            prepared.former, prepared.former_us = known.mark.former, known.mark.former_us
        else:
            prepared.former, prepared.former_us = await asyncio.to_thread(last_batches, client), now_us
        told = partial(progress, "charges of the trail")
        folding = partial(fold_trail, client, prepared.rebuilt, prepared.former, prepared.former_us, told)
        await asyncio.to_thread(folding)
        commands = await asyncio.to_thread(trail_commands, client, now_us - SEQ_KEPT_US)
        for command, sent in sorted(commands, key=lambda each: each[0].seq):
            prepared.rebuilt.command(command, sent=sent)
        prepared.commands = [command for command, sent in commands if sent and _still_speaks(command, known, now_us)]
        if again:
            await _fold_topic(consumer, settings, prepared, progress)
    if not prepared.rebuilt.tally.charges:
        raise RebuildError("the trail holds no charge: there is nothing to take over, so start a worker")
    _finish(prepared, known, clock())
    return prepared


def _still_speaks(command: Command, known: _Known, now_us: int) -> bool:
    """Say whether a command of the trail must be written back: it holds, and `commands.v1` has none as new."""
    there = known.commands.get(command.key.encode())
    ended = command.expires_at is not None and to_us(command.expires_at) <= now_us
    return not ended and (there is None or there.seq < command.seq)


def _empty(settings: WorkerSettings, feed: PolicyFeed) -> Rebuilt:
    idle_us = bound_us(settings.state_idle_days, settings.usage_age_max_s)
    return Rebuilt(feed.policies, partial(partition_of, partitions=settings.partitions), idle_us)


def _finish(prepared: Prepared, known: _Known, now_us: int) -> None:
    # What the recorder had not copied into the ledger yet; what it had changes nothing.
    for command in known.commands.values():
        prepared.rebuilt.command(command, sent=True)
    prepared.rebuilt.finish(now_us)


@asynccontextmanager
async def reading(broker: BrokerSettings) -> "AsyncIterator[Any]":
    """Give a consumer of no group."""
    consumer = Consumer(**consumer_options(broker, CLIENT_ID))
    try:
        async with asyncio.timeout(ANSWER_S):
            await consumer.start()
        yield consumer
    finally:
        await stop(consumer)


async def _known(consumer: Any, settings: WorkerSettings, progress: Progress) -> _Known:
    # aiokafka has no public way to the partitions of a topic that is not read yet.
    cluster = await _answer(consumer._client.fetch_all_metadata())  # noqa: SLF001
    topics = cluster.topics()
    missing = [topic.name for topic in (USAGE, PACKED, LEDGER, BUDGETS, PRICES, COMMANDS) if topic.name not in topics]
    if missing:
        raise RebuildError(
            f"there is no topic {', '.join(missing)}: create what is missing with `spendfuse topics create`. "
            "If usage or ledger were lost with it, rebuild with --from clickhouse"
        )
    for topic in (USAGE, PACKED, LEDGER):
        count = len(cluster.partitions_for_topic(topic.name) or ())
        if count != settings.partitions:
            raise RebuildError(
                f"{topic.name} has {count} partitions, and this command was told {settings.partitions}: give it the "
                "workers' settings (SPENDFUSE_PARTITIONS)"
            )
    mark = None
    if mark_topic(settings.app_id) in topics:
        try:
            mark = await read_mark(consumer, settings.app_id)
        except ValueError as error:
            raise RebuildError(f"{error}: delete that topic if nobody else uses it, and run this again") from error
    known = _Known(PolicyFeed(price_book_of(settings)), mark)
    verifier = _verifier(settings)

    def take(record: Any) -> None:
        if record.topic == BUDGETS.name:
            known.budgets += known.feed.budget_record(record.key, record.value) is None
        elif record.topic == PRICES.name:
            known.prices += known.feed.price_record(record.key, record.value) is None
        else:
            _take_command(known, record, verifier)

    for topic in (BUDGETS, PRICES, COMMANDS):
        await read_to_end(consumer, topic, topic.partitions, take, partial(progress, f"records of {topic.name}"))
    return known


def _verifier(settings: WorkerSettings) -> Verifier | None:
    """Return what knows a genuine command; the private key is not needed to read."""
    if settings.signing_key.get_secret_value() or settings.unsigned_commands:
        return verifier_of(signer_of(settings), settings)
    if not settings.public_keys:
        raise SettingsError(
            "to tell genuine commands, SPENDFUSE_PUBLIC_KEYS (or SPENDFUSE_SIGNING_KEY_FILE, as the worker has it) "
            "must be set; SPENDFUSE_UNSIGNED_COMMANDS=true does without, in development only"
        )
    try:
        return Verifier.parse(settings.public_keys)
    except ValueError as error:
        raise SettingsError(f"SPENDFUSE_PUBLIC_KEYS cannot be used: {error}") from error


def _take_command(known: _Known, raw: Any, verifier: Verifier | None) -> None:
    record = Record(raw.topic, raw.partition, raw.offset, raw.timestamp, raw.key, raw.value, tuple(raw.headers))
    try:
        command = accept(record, verifier, unsigned=verifier is None)
    except Refused:
        return  # the recorder reports it
    key = record.key or b""
    before = known.commands.get(key)
    if before is None or command.seq > before.seq:
        known.commands[key] = command


async def _fold_topic(consumer: Any, settings: WorkerSettings, prepared: Prepared, progress: Progress) -> None:
    def fold(record: Any) -> None:
        if not fold_ledger(record.value, record.headers, prepared.rebuilt):
            prepared.unreadable += 1

    told = partial(progress, f"records of {LEDGER.name}")
    prepared.ends[LEDGER.name] = await read_to_end(consumer, LEDGER, settings.partitions, fold, told)


async def read_to_end(
    consumer: Any, topic: Topic, partitions: int, take: Callable[[Any], None], progress: Callable[[int, int], None]
) -> dict[int, int]:
    """Give every record that a topic holds to `take`, partition by partition; return where each ended then.

    `progress` is told offsets.
    """
    places = [TopicPartition(topic.name, number) for number in range(partitions)]
    consumer.assign(places)
    begins = await _answer(consumer.beginning_offsets(places))
    ends = {place: await _answer(end_of(consumer, place)) for place in places}
    consumer.assign(places)
    total, done = sum(ends[place] - begins[place] for place in places), 0
    progress(0, total)
    for place in places:
        consumer.seek(place, begins[place])
        at = begins[place]
        while at < ends[place]:
            batches = await _answer(consumer.getmany(place, timeout_ms=READ_MS, max_records=READ_RECORDS_MAX))
            for record in batches.get(place, ()):
                if record.offset < ends[place]:
                    take(record)
            # The position, not the last record's offset: compaction may have taken the last records.
            before, at = at, await _answer(consumer.position(place))
            done += at - before
            progress(min(done, total), total)
    return {place.partition: end for place, end in ends.items()}


async def _answer(work: Awaitable[Any]) -> Any:
    async with asyncio.timeout(ANSWER_S):
        return await work


async def _check_ends(broker: BrokerSettings, rebuilt: Rebuilt) -> None:
    """Raise RebuildError when the ledger's origins lie beyond the ends of the topics they are of."""
    ends = Ends(KafkaEnds(broker))
    packed: dict[int, int] = {}
    for (number, _), offset in rebuilt.as_of.items():
        packed[number] = max(packed.get(number, -1), offset)
    try:
        for topic, places in ((USAGE, rebuilt.reached), (PACKED, packed)):
            for number, offset in sorted(places.items()):
                await ends.vouch(topic.name, number, offset)
    except StateMismatchError as error:
        raise RebuildError(
            f"the ledger and the topics do not fit: {error}. To go on without it, make all of spendfuse's topics anew "
            "(ClickHouse keeps the trail) and run `spendfuse state rebuild --from clickhouse`"
        ) from error


async def check_unmoved(broker: BrokerSettings, settings: WorkerSettings, prepared: Prepared) -> None:
    """Raise RebuildError when what was read has grown since: a worker ran meanwhile."""
    async with reading(broker) as consumer:
        for topic, ends in prepared.ends.items():
            places = [TopicPartition(topic, number) for number in ends]
            consumer.assign(places)
            for place in places:
                end = await _answer(end_of(consumer, place))
                if end != ends[place.partition]:
                    raise RebuildError(
                        f"{topic} partition {place.partition} ended at {ends[place.partition]} when it was read, and "
                        f"ends at {end} now: somebody writes there. Stop every worker, and run this again"
                    )
        if prepared.source == "clickhouse" and not prepared.ends:
            await check_nothing_counted(consumer, settings.partitions)


async def check_nothing_counted(consumer: Any, partitions: int) -> None:
    """Raise RebuildError when a worker has counted on this Kafka: its usage is in the trail, and would count twice."""
    places = [TopicPartition(PACKED.name, number) for number in range(partitions)]
    consumer.assign(places)
    for place in places:
        end = await _answer(end_of(consumer, place))
        if end:
            raise RebuildError(
                f"{PACKED.name} partition {place.partition} has {end} records: a worker has counted on this Kafka, and "
                "the trail cannot tell that from what it counted on another. If this Kafka is whole, run `spendfuse "
                "state rebuild --from ledger`; if it is new, make its topics anew, and rebuild before a worker starts"
            )


def _trail_policies(client: TrailReader, known: _Known) -> tuple[list[Given], list[Given]]:
    """Return the budgets and prices to write back, where this Kafka has none; they are in force from now on."""
    latest: dict[str, dict[bytes, bytes]] = {"budget": {}, "price": {}}
    for kind, data in client.query(load("state_policies"), {}).result_rows:
        value = json.loads(data)
        if value.get("withdrawn") is True:
            latest[kind].pop(str(value["key"]).encode(), None)
        else:
            name = f"workspace/{value['workspace']}" if value.get("type") == "workspace" else value["id"]
            latest[kind][str(name).encode()] = json.dumps(value).encode()
    budgets = [] if known.budgets else list(_in_force(latest["budget"], known.feed.budget_record))
    prices = [] if known.prices else list(_in_force(latest["price"], known.feed.price_record))
    return budgets, prices


def _in_force(found: dict[bytes, bytes], take: Callable[[bytes, bytes], str | None]) -> Iterator[Given]:
    for key, value in found.items():
        if take(key, value) is None:
            yield key, value
