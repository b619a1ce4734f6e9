"""The one place that wires topics, tables and agents."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any, Final

import faust
from aiokafka.errors import KafkaError
from mode import CrashingSupervisor, Service

from spendfuse.client.clock import Clock, ScaledClock, parse_clock
from spendfuse.engine.idle import bound_us
from spendfuse.pipeline import faust_cures
from spendfuse.pipeline.awake import Awake
from spendfuse.pipeline.changelogs import read_to_end
from spendfuse.pipeline.feed import PolicyFeed, price_book_of
from spendfuse.pipeline.genuine import signer_of, verifier_of
from spendfuse.pipeline.lag import Reading
from spendfuse.pipeline.meter import MeterStage, MeterTables
from spendfuse.pipeline.outbox import KafkaOutbox
from spendfuse.pipeline.proofs import GuardKeys
from spendfuse.pipeline.publish import Publisher
from spendfuse.pipeline.records import SourceRecord
from spendfuse.pipeline.refusal import Ends, KafkaEnds, ending
from spendfuse.pipeline.register import Register
from spendfuse.pipeline.rollup import RollupStage
from spendfuse.pipeline.services import Services
from spendfuse.pipeline.tables import FaustTable
from spendfuse.pipeline.topics import CHANGELOG_CONFIGS
from spendfuse.pipeline.violations import Violations
from spendfuse.settings import BrokerSettings, ClockSettings, WorkerSettings
from spendfuse.wire.topics import PACKED, ROLLUPS, Topic

RAW: Final = {"key_type": bytes, "value_type": bytes, "key_serializer": "raw", "value_serializer": "raw"}
SECONDS_PER_MS: Final = 0.001
SECOND_US: Final = 1_000_000
COMMIT_INTERVAL_S: Final = 1.0
POLL_RECORDS_MAX: Final = 1_000
TICK_S: Final = 0.2
SIGN_S: Final = 2.0
"""Longest a heartbeat waits for a broker: one that arrived later would say of the past that it is live."""


def create_app(
    broker: BrokerSettings,
    settings: WorkerSettings,
    clocks: ClockSettings,
    on_ready: Callable[[], None] = lambda: None,
    refuse: Callable[[str], None] = lambda _: None,
    on_frozen: Callable[[float], None] = lambda _: None,
    on_undelivered: Callable[[str, KafkaError], None] = lambda _topic, _error: None,
) -> Any:
    """Return the worker's Faust app: intake, meter, rollup, recorder and heartbeats.

    `refuse` is given the sentence when state and topics do not fit; it ends the process. So does `on_frozen`, which is
    given for how many seconds the process did not run. `on_undelivered` is given the topic and the error of a record
    that the broker did not take; the worker then ends.

    Raises `SettingsError` for a missing or unreadable signing key or price book.
    """
    # A session may have begun to run out one heartbeat before the freeze.
    awake = Awake((broker.session_timeout_ms - broker.heartbeat_interval_ms) * SECONDS_PER_MS, on_frozen)
    faust_cures.install(broker.fetch_max_wait_ms, awake.listen, partial(read_to_end, broker))
    clock = parse_clock(clocks.clock)
    app = _faust_app(broker, settings)
    outbox = KafkaOutbox(broker, awake)
    outbox.on_failed = on_undelivered
    signs = KafkaOutbox(broker, awake, SIGN_S)
    feed = PolicyFeed(price_book_of(settings))
    signer = signer_of(settings)
    publisher = Publisher(outbox, signer, settings.partitions)
    register = Register(verifier_of(signer, settings), GuardKeys.of(settings))
    emitter = f"{settings.app_id}/{socket.gethostname()[:48]}/{os.getpid()}"
    services = Services(
        broker=broker,
        settings=settings,
        outbox=outbox,
        publisher=publisher,
        signs=signs,
        sign=Publisher(signs, signer, settings.partitions),
        feed=feed,
        clock=clock,
        emitter=emitter,
        register=register,
    )
    services.on_ready = on_ready
    services.refuse = refuse
    services.is_live = lambda: not (app.rebalancing or app.tables.recovery.in_recovery)

    async def judge_again(*_: Any, **__: Any) -> None:
        services.budgets_changed.set()  # whoever had these partitions may have gone before it knew the last change

    app.on_rebalance_complete.connect(judge_again)
    factor = clock.factor if isinstance(clock, ScaledClock) else 1  # the grace is for what takes real time
    violations = Violations(register.halts, int(settings.violation_grace_s * SECOND_US) * factor)
    ends = Ends(KafkaEnds(broker))
    meter, rollup = _agents(app, settings, publisher, outbox, feed, clock, services, violations, ends, awake, register)
    _run_beside(app, services, settings, meter, rollup, awake)
    return app


def _faust_app(broker: BrokerSettings, settings: WorkerSettings) -> Any:
    return faust.App(
        settings.app_id,
        broker=[f"kafka://{server}" for server in broker.bootstrap_servers.split(",")],
        broker_credentials=_credentials(broker),
        broker_session_timeout=broker.session_timeout_ms * SECONDS_PER_MS,
        broker_rebalance_timeout=broker.rebalance_timeout_ms * SECONDS_PER_MS,
        broker_heartbeat_interval=broker.heartbeat_interval_ms * SECONDS_PER_MS,
        broker_commit_interval=COMMIT_INTERVAL_S,
        broker_max_poll_records=POLL_RECORDS_MAX,
        stream_wait_empty=False,
        producer_linger=0,
        producer_max_batch_size=broker.producer_max_batch_size,
        producer_acks=-1,
        topic_partitions=settings.partitions,
        topic_replication_factor=settings.replication,
        topic_disable_leader=True,
        table_standby_replicas=0,
        agent_supervisor=CrashingSupervisor,
        store="memory://",
        datadir=settings.data_dir,
        web_enabled=False,
        worker_redirect_stdouts=False,
    )


def _credentials(broker: BrokerSettings) -> Any:
    if broker.security_protocol == "PLAINTEXT":
        return None
    from aiokafka.helpers import create_ssl_context  # noqa: PLC0415 - needed only where the wire is encrypted

    context = create_ssl_context(cafile=broker.ssl_cafile or None) if "SSL" in broker.security_protocol else None
    if "SASL" not in broker.security_protocol:
        return faust.SSLCredentials(context)
    return faust.SASLCredentials(
        mechanism=broker.sasl_mechanism,
        username=broker.sasl_username,
        password=broker.sasl_password.get_secret_value(),
        ssl_context=context,
    )


def _topic(app: Any, topic: Topic, partitions: int) -> Any:
    return app.topic(topic.name, partitions=partitions, internal=False, **RAW)


def _agents(
    app: Any,
    settings: WorkerSettings,
    publisher: Publisher,
    outbox: KafkaOutbox,
    feed: PolicyFeed,
    clock: Clock,
    services: Services,
    violations: Violations,
    ends: Ends,
    awake: Awake,
    register: Register,
) -> tuple[MeterStage, RollupStage]:
    def table(name: str) -> FaustTable:
        made = app.Table(
            name,
            key_type=bytes,
            value_type=bytes,
            partitions=settings.partitions,
            extra_topic_configs=CHANGELOG_CONFIGS,
        )
        return FaustTable(made, outbox, awake)

    def generation() -> int:
        number: int = app.consumer_generation_id
        return number

    idle_us = bound_us(settings.state_idle_days, settings.usage_age_max_s)
    meter = MeterStage(
        tables=MeterTables(table("scopes"), table("ids")),
        publisher=publisher,
        feed=feed,
        clock=clock,
        generation=generation,
        violations=violations,
        ends=ends,
        idle_us=idle_us,
        said=register.of_scope,
    )
    rollup = RollupStage(
        table=table("shared"),
        publisher=publisher,
        feed=feed,
        clock=clock,
        generation=generation,
        ends=ends,
        idle_us=idle_us,
        said=register.of_scope,
    )

    async def meter_agent(stream: Any) -> None:
        with ending(services.refuse):
            async for record in _records(stream, services):
                await meter.on_record(record)

    async def rollup_agent(stream: Any) -> None:
        with ending(services.refuse):
            async for record in _records(stream, services):
                await rollup.on_record(record)

    app.agent(_topic(app, PACKED, settings.partitions), name="meter")(meter_agent)
    app.agent(_topic(app, ROLLUPS, settings.partitions), name="rollup")(rollup_agent)
    return meter, rollup


async def _records(stream: Any, services: Services) -> AsyncIterator[SourceRecord]:
    """Yield the records of a stream once budgets and prices are known; each is acknowledged by its stage."""
    await services.informed.wait()
    async for event in stream.noack().events():
        message = event.message
        services.first.setdefault((message.topic, message.partition), message.offset)
        yield SourceRecord(
            message.topic,
            message.partition,
            message.offset,
            int((message.timestamp or 0) * 1_000),
            message.key,
            message.value,
            event.ack,
        )


class _Beside(Service):
    """What runs beside the agents; a task that fails ends the worker."""

    services: Services
    meter: MeterStage
    rollup: RollupStage
    flush_s: float
    rollup_s: float
    awake: Awake
    owned: Callable[[Topic], set[int]]

    async def on_start(self) -> None:
        await self.services.start()

    async def on_stop(self) -> None:
        await self.services.stop()

    @Service.task
    async def intake(self) -> None:
        await self.services.intake()

    @Service.task
    async def announce(self) -> None:
        await self.services.announce()

    @Service.task
    async def recorder(self) -> None:
        await self.services.recorder()

    @Service.task
    async def heartbeats(self) -> None:
        await self.services.heartbeats()

    @Service.task
    async def watch_trail(self) -> None:
        await self.services.watch_trail()

    @Service.task
    async def stay_awake(self) -> None:
        while not self.should_stop:  # by itself: a flush may wait for a broker longer than a session, and is awake
            self.awake.tick()
            await asyncio.sleep(TICK_S)

    @Service.task
    async def heal_tables(self) -> None:
        while not self.should_stop:
            await asyncio.sleep(self.flush_s)
            if self.services.is_live():
                await self.meter.heal(self.owned(PACKED))
                await self.rollup.heal(self.owned(ROLLUPS))

    @Service.task
    async def flush_meter(self) -> None:
        while not self.should_stop:
            await asyncio.sleep(self.flush_s)
            await self.meter.flush()

    @Service.task
    async def publish_rollups(self) -> None:
        while not self.should_stop:
            await asyncio.sleep(self.rollup_s)
            await self.meter.publish_rollups()

    @Service.task
    async def flush_rollup(self) -> None:
        while not self.should_stop:
            await asyncio.sleep(self.flush_s)
            await self.rollup.flush()

    @Service.task
    async def follow_budgets(self) -> None:
        while not self.should_stop:
            await self.services.budgets_changed.wait()
            if not self.services.is_live():  # tables in the middle of a recovery do not say what was spent
                await asyncio.sleep(self.flush_s)
                continue
            self.services.budgets_changed.clear()
            with ending(self.services.refuse):
                await self.meter.flush()
                await self.rollup.flush()
                await self.meter.reconsider(self.owned(PACKED))
                await self.rollup.reconsider(self.owned(ROLLUPS))


def _reading(consumer: Any, topic: Topic, first: Mapping[tuple[str, int], int]) -> Reading:
    """Return how far an agent's topic is read and acknowledged, by Faust's own notes.

    `first`: the offset of each partition's first record that came here, for partitions of which none is acknowledged.
    """
    position = end = 0
    is_known = True
    owned = frozenset(place for place in consumer.assignment() if place.topic == topic.name)
    for place in owned:
        reached = consumer._committed_offset.get(place)  # noqa: SLF001 - no public, synchronous position
        last = consumer.highwater(place)
        if last is None:
            is_known = False
            continue
        if reached is None:
            reached = first.get((place.topic, place.partition), last)
        position += reached
        end += max(reached, last)
    return Reading(owned, position, end, is_known)


def _run_beside(
    app: Any, services: Services, settings: WorkerSettings, meter: MeterStage, rollup: RollupStage, awake: Awake
) -> None:
    """Tie the services to the app's life."""

    def owned(topic: Topic) -> set[int]:
        return {partition for name, partition in app.consumer.assignment() if name == topic.name}

    def readings() -> dict[str, Reading]:
        agents = {"meter": PACKED, "rollup": ROLLUPS}
        return {stage: _reading(app.consumer, topic, services.first) for stage, topic in agents.items()}

    services.readings = readings
    # Faust makes the service itself, so its parts come as attributes of its class.
    parts = {
        "services": services,
        "meter": meter,
        "rollup": rollup,
        "flush_s": settings.flush_interval_ms * SECONDS_PER_MS,
        "awake": awake,
        "rollup_s": settings.rollup_interval_ms * SECONDS_PER_MS,
        "owned": staticmethod(owned),
    }
    app.service(type("Beside", (_Beside,), parts))
