"""A rebuild's writing: no worker alive, a mark before and after, and no key in the changelogs but those rebuilt."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import GroupIdNotFound, KafkaError, TopicAlreadyExistsError, for_code
from pydantic import ValidationError

from spendfuse.client.connection import admin_options
from spendfuse.pipeline.codec import encode_scope, encode_shared
from spendfuse.pipeline.genuine import signer_of
from spendfuse.pipeline.outbox import KafkaOutbox
from spendfuse.pipeline.publish import Publisher
from spendfuse.pipeline.rebuild import (
    ANSWER_S,
    CLIENT_ID,
    Prepared,
    Progress,
    RebuildError,
    check_unmoved,
    read_to_end,
    reading,
)
from spendfuse.pipeline.rebuild_mark import KEY, mark_topic
from spendfuse.pipeline.records import Delivery
from spendfuse.pipeline.routing import state_key
from spendfuse.pipeline.topics import CHANGELOG_CONFIGS
from spendfuse.settings import BrokerSettings, WorkerSettings
from spendfuse.wire.control import Heartbeat
from spendfuse.wire.topics import BUDGETS, HEARTBEATS, PRICES, Topic

TABLES: Final = ("scopes", "ids", "shared")
IN_FLIGHT_MAX: Final = 500
"""Most records sent and not yet acknowledged."""
LEAVING_S: Final = 5.0
"""How much longer than its session a worker that died is waited for."""
POLL_S: Final = 0.5
ALIVE_MS: Final = 15_000
"""A heartbeat this fresh is a worker's that runs, whoever says that none does."""
MEMBERS: Final = 5
"""Where the broker's description of a group has its members."""

Row = tuple[str, int, bytes, bytes]
"""Table, partition, key and value."""


@dataclass(slots=True)
class Written:
    """Records written, by table; `stale` are keys that were there and are no more."""

    rows: dict[str, int]
    stale: int


def rows_of(prepared: Prepared) -> Iterator[Row]:
    """Yield what the tables are to hold; only once."""
    rebuilt = prepared.rebuilt
    for (partition, scope), state in rebuilt.scopes.items():
        yield "scopes", partition, state_key(partition, scope), encode_scope(state)
    for partition, slot, value in rebuilt.slots():
        yield "ids", partition, state_key(partition, str(slot)), value
    for (partition, scope), shared in rebuilt.shared.items():
        yield "shared", partition, state_key(partition, scope), encode_shared(shared)


async def write(
    broker: BrokerSettings, settings: WorkerSettings, prepared: Prepared, progress: Progress, *, stopped: bool
) -> Written:
    """Write the tables, what a new Kafka lacks, and the marks around it; `stopped`: a person says that no worker runs.

    Raises RebuildError while a worker of the app is alive; a `KafkaError` may leave a part written, and the mark.
    """
    outbox = KafkaOutbox(broker)
    admin = AIOKafkaAdminClient(**admin_options(broker, CLIENT_ID))
    await admin.start()
    try:
        await _refuse_workers(admin, broker, settings, stopped=stopped)
        await _ensure_topics(admin, settings)
        await outbox.start()
        put = _Putting(outbox)
        await _mark(outbox, settings, prepared, "writing")
        # From here on no worker starts; one that was already on its way has joined by the end.
        await check_unmoved(broker, settings, prepared)
        before = await _keys(broker, settings, progress)
        written = await _write_tables(put, settings, prepared, before, progress)
        await _write_back(put, outbox, settings, prepared)
        await put.settled()
        await _refuse_workers(admin, broker, settings, stopped=stopped)
        await check_unmoved(broker, settings, prepared)
        await _mark(outbox, settings, prepared, "done")
    finally:
        await outbox.stop()
        await admin.close()
    return written


async def _mark(outbox: KafkaOutbox, settings: WorkerSettings, prepared: Prepared, phase: str) -> None:
    """Write the mark, and return once every replica has it."""
    value = prepared.mark(phase).model_dump_json().encode()
    await (await outbox.put(mark_topic(settings.app_id), key=KEY, value=value, partition=0))


class _Putting:
    """Sends records with a bounded number in flight."""

    def __init__(self, outbox: KafkaOutbox) -> None:
        self._outbox = outbox
        self._waiting: list[Delivery] = []

    async def __call__(self, topic: str, partition: int, key: bytes, value: bytes | None) -> None:
        await self.wait_for(await self._outbox.put(topic, key=key, value=value, partition=partition))

    async def wait_for(self, delivery: Delivery) -> None:
        self._waiting.append(delivery)
        if len(self._waiting) >= IN_FLIGHT_MAX:
            await self.settled()

    async def settled(self) -> None:
        waiting, self._waiting = self._waiting, []
        async with asyncio.timeout(ANSWER_S):
            await asyncio.gather(*waiting)


async def _write_tables(
    put: _Putting, settings: WorkerSettings, prepared: Prepared, before: dict[str, dict[bytes, int]], progress: Progress
) -> Written:
    written = Written(dict.fromkeys(TABLES, 0), 0)
    rebuilt = prepared.rebuilt
    total = len(rebuilt.scopes) + len(rebuilt.shared) + sum(len(seen.dirty) for seen in rebuilt.seen.values())
    for table, partition, key, value in rows_of(prepared):
        if before[table].pop(key, None) is not None:
            # A recovery prefers what has counted more, and what is rebuilt may lack calls in flight: it begins anew.
            await put(_changelog(settings, table), partition, key, None)
        await put(_changelog(settings, table), partition, key, value)
        written.rows[table] += 1
        progress("records of the tables", sum(written.rows.values()), total)
    for table, keys in before.items():
        for key, number in keys.items():
            await put(_changelog(settings, table), number, key, None)
            written.stale += 1
        if not (written.rows[table] or keys):
            # A changelog without any record passes for a lost one; everything in it may have been idle.
            await put(_changelog(settings, table), 0, state_key(0, ""), None)
    return written


async def _write_back(put: _Putting, outbox: KafkaOutbox, settings: WorkerSettings, prepared: Prepared) -> None:
    for topic, records in ((BUDGETS, prepared.budgets), (PRICES, prepared.prices)):
        for key, value in records:
            await put(topic.name, 0, key, value)
    if prepared.commands:
        publisher = Publisher(outbox, signer_of(settings), settings.partitions)
        for command in sorted(prepared.commands, key=lambda each: each.seq):
            await put.wait_for(await publisher.command(command))


def _changelog(settings: WorkerSettings, table: str) -> str:
    return f"{settings.app_id}-{table}-changelog"


async def _keys(broker: BrokerSettings, settings: WorkerSettings, progress: Progress) -> dict[str, dict[bytes, int]]:
    """Return the keys that each changelog holds now, and where, whatever their values are."""
    found: dict[str, dict[bytes, int]] = {}
    async with reading(broker) as consumer:
        for table in TABLES:
            keys = found[table] = dict[bytes, int]()

            def take(record: Any, keys: dict[bytes, int] = keys) -> None:
                keys[record.key or b""] = record.partition
                if record.value is None:
                    del keys[record.key or b""]

            name = _changelog(settings, table)
            topic = Topic(name, "", settings.partitions, "compact", -1, "")
            await read_to_end(consumer, topic, settings.partitions, take, lambda *_: None)
            progress(f"old keys of {name}", len(keys), len(keys))
    return found


async def _ensure_topics(admin: Any, settings: WorkerSettings) -> None:
    """Make the changelogs and the mark's topic where they are missing, as a worker would."""
    wanted = {_changelog(settings, table): settings.partitions for table in TABLES} | {mark_topic(settings.app_id): 1}
    existing = set(await admin.list_topics())
    described = await admin.describe_topics([name for name in wanted if name in existing]) if existing else []
    for topic in described:
        count = len(topic["partitions"])
        if not topic["error_code"] and topic["topic"] in wanted and count != wanted[topic["topic"]]:
            raise RebuildError(
                f"{topic['topic']} has {count} partitions, and this deployment wants {wanted[topic['topic']]}: set "
                "SPENDFUSE_PARTITIONS to what exists, or delete that topic"
            )
    missing = [
        NewTopic(
            name=name,
            num_partitions=partitions,
            replication_factor=settings.replication,
            topic_configs=CHANGELOG_CONFIGS,
        )
        for name, partitions in wanted.items()
        if name not in existing
    ]
    if missing:
        response = await admin.create_topics(missing)
        for name, code, *rest in response.topic_errors:
            if code not in {0, TopicAlreadyExistsError.errno}:
                raise for_code(code)(f"topic {name} was not created: {rest[0] if rest else code}")


async def refuse_workers(broker: BrokerSettings, settings: WorkerSettings, *, stopped: bool) -> None:
    """Return once no worker of the app is a member of its groups; raises RebuildError when one stays."""
    admin = AIOKafkaAdminClient(**admin_options(broker, CLIENT_ID))
    await admin.start()
    try:
        await _refuse_workers(admin, broker, settings, stopped=stopped)
    finally:
        await admin.close()


async def _refuse_workers(admin: Any, broker: BrokerSettings, settings: WorkerSettings, *, stopped: bool) -> None:
    if stopped:
        beating = await _beating(broker, settings.app_id)
        if beating:
            raise RebuildError(
                f"worker {beating} gave a sign of life within the last {ALIVE_MS // 1_000} s: stop it first"
            )
        return
    groups = [settings.app_id, f"{settings.app_id}-intake", f"{settings.app_id}-recorder"]
    give_up_at = time.monotonic() + broker.session_timeout_ms / 1_000 + LEAVING_S
    while True:
        try:
            alive = {group: count for group in groups if (count := await _members(admin, group))}
        except KafkaError:  # a coordinator is still being found: on a new Kafka that takes a moment
            if time.monotonic() > give_up_at:
                raise
            await asyncio.sleep(POLL_S)
            continue
        if not alive:
            return
        if time.monotonic() > give_up_at:
            said = ", ".join(f"{group} has {count}" for group, count in alive.items())
            raise RebuildError(
                f"a worker of {settings.app_id} is alive (members of its groups: {said}): stop every worker, and run "
                "this again. The embedded broker never forgets a member: there, say --stopped once none runs"
            )
        await asyncio.sleep(POLL_S)


async def _members(admin: Any, group: str) -> int:
    """Return how many members a group has; raises a `KafkaError` when its coordinator does not say."""
    # One group at a time: the embedded broker mixes up the answers for several.
    async with asyncio.timeout(ANSWER_S):
        (response,) = await admin.describe_consumer_groups([group])
    found = [each for each in response.groups if each[1] == group]
    for code in (each[0] for each in found):
        if code not in {0, GroupIdNotFound.errno}:
            raise for_code(code)(f"the coordinator of group {group} does not describe it")
    return sum(len(each[MEMBERS]) for each in found)


async def _beating(broker: BrokerSettings, app_id: str) -> str | None:
    """Return a worker of the app whose heartbeat is fresh, by the wall clock that stamps records."""
    found: list[str] = []
    since_ms = time.time_ns() // 1_000_000 - ALIVE_MS

    def take(record: Any) -> None:
        try:
            beat = Heartbeat.model_validate_json(record.value or b"")
        except ValidationError:
            return
        if record.timestamp > since_ms and beat.emitter.startswith(f"{app_id}/"):
            found.append(beat.emitter)

    async with reading(broker) as consumer:
        await read_to_end(consumer, HEARTBEATS, 1, take, lambda *_: None)
    return found[-1] if found else None
