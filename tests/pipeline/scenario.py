"""What a deployment must do, as scenes played against any Kafka: the embedded one, a real one, one in a container."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections import Counter, defaultdict
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import cramjam
import pytest
from aiokafka import AIOKafkaProducer

import raw_batches
from pipeline.oracle import Truth
from pipeline.samples import BOOK, INPUT_NANOS, OUTPUT_NANOS, budget, cap
from spendfuse.client import Guard, Halted, Meter
from spendfuse.client.batches import UNPACKED_BYTES_MAX
from spendfuse.client.connection import producer_options
from spendfuse.client.follow import Follower, Record
from spendfuse.client.keys import Verifier, generate
from spendfuse.embedded.tansu import BrokerUnavailableError, EmbeddedBroker
from spendfuse.pipeline.codec import decode_scope, decode_shared
from spendfuse.pipeline.topics import ensure_topics
from spendfuse.settings import BrokerSettings, GuardSettings, IdentitySettings, MeterSettings
from spendfuse.wire import Budget, Command, Heartbeat, LedgerBatch, LedgerEntry, Tokens, Usage, UsagePack, encode
from spendfuse.wire.base import from_us
from spendfuse.wire.topics import ACKS, ALERTS, COMMANDS, DEAD_LETTERS, HEARTBEATS, LEDGER, PACKED, TOPICS, USAGE
from workers import WorkerProcess, quick_settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from pathlib import Path

PARTITIONS = 4
DEADLINE_S = 45.0
"""Longest a scene waits for anything: the takeover from a killed worker takes two sessions on the embedded broker."""
WATCHED = (USAGE, PACKED, DEAD_LETTERS, COMMANDS, ALERTS, ACKS, HEARTBEATS, LEDGER)
CHANGELOGS = ("spendfuse-scopes-changelog", "spendfuse-shared-changelog")
UNREAD = {"heartbeats", "ledger", "batches", "checkpoints", "remaining"}
READ_BY_WORKERS = {topic.name for topic in TOPICS if topic.name.split(".")[1] not in UNREAD}
JUNK = b"\xff\x00 not what anybody expects"
PRIVATE, PUBLIC = generate("test")


@dataclass
class Deployment:
    """A broker, a directory for logs, and the workers started on it."""

    broker: BrokerSettings
    directory: Path
    running: dict[str, WorkerProcess] = field(default_factory=dict)

    def create_topics(self) -> None:
        asyncio.run(ensure_topics(self.broker, partitions=PARTITIONS, replication=1))

    def worker(self, name: str) -> WorkerProcess:
        """Start a worker, or one of that name again."""
        worker = self.running.get(name)
        if worker is None:
            book = self.directory / "book.json"
            book.write_bytes(encode(BOOK))
            env = {"SPENDFUSE_PRICE_BOOK_FILE": str(book), "SPENDFUSE_SIGNING_KEY": PRIVATE}
            worker = self.running[name] = WorkerProcess(self.directory, name, self.broker, env)
        if not worker.alive:
            worker.begin()
        return worker

    def only(self, *names: str) -> None:
        """Let exactly these workers run, and wait until they are ready."""
        for name, worker in self.running.items():
            if name not in names:
                worker.stop()
        for worker in [self.worker(name) for name in names]:
            worker.until_ready()

    def stop(self) -> None:
        for worker in self.running.values():
            worker.kill()


@contextmanager
def deployment(broker: BrokerSettings, directory: Path) -> Iterator[Deployment]:
    made = Deployment(broker, directory)
    try:
        made.create_topics()
        yield made
    finally:
        made.stop()


@contextmanager
def embedded_deployment(directory: Path, *workers: str) -> Iterator[Deployment]:
    """Run workers on an embedded broker of their own; the test is skipped where there is none."""
    try:
        broker = EmbeddedBroker(directory).start()
    except BrokerUnavailableError as error:
        pytest.skip(str(error))
    with broker, deployment(quick_settings(broker), directory) as made:
        made.only(*workers)
        yield made


@dataclass
class Watch:
    """Everything on the topics since they were made, as it arrives; and a producer to write to them."""

    producer: AIOKafkaProducer
    records: dict[str, list[Record]] = field(default_factory=lambda: defaultdict(list))
    arrived: dict[tuple[str, int, int], float] = field(default_factory=dict)
    entries: list[LedgerEntry] = field(default_factory=list)
    reached: dict[tuple[int, str, int], tuple[int, int]] = field(default_factory=dict)

    def take(self, record: Record) -> None:
        self.records[record.topic].append(record)
        self.arrived[(record.topic, record.partition, record.offset)] = time.time()
        if record.topic == LEDGER.name and record.value not in (JUNK, None):
            self._trim(record)

    async def until(self, condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
        give_up_at = time.monotonic() + deadline_s
        while not condition():
            if time.monotonic() > give_up_at:
                counts = {topic: len(records) for topic, records in self.records.items()}
                raise AssertionError(f"within {deadline_s:g} s {what} did not happen; records: {counts}")
            await asyncio.sleep(0.02)

    async def emit(self, *usages: Usage, partition: int | None = None, key: bytes | None = b"any key") -> None:
        value = encode(usages[0]) if len(usages) == 1 else encode(UsagePack(usages=list(usages)))
        await self.producer.send(USAGE.name, value, key=key, partition=partition)

    async def apply(self, *budgets: Budget) -> None:
        """Apply budgets, and wait until a worker says that it knows so many as were ever applied."""
        for each in budgets:
            await self.producer.send_and_wait("spendfuse.budgets.v1", encode(each), key=each.id.encode())

    def commands(self, workspace: str) -> list[Command]:
        """The commands for a workspace, each checked to be signed by the worker's key."""
        found = []
        for record in self.records[COMMANDS.name]:
            if f":{workspace}" in (record.key or b"").decode("utf-8", "replace"):
                Verifier.parse(PUBLIC).verify(
                    record.topic, record.key or b"", record.value or b"", record.header("spendfuse-sig")
                )
                found.append(Command.model_validate_json(record.value or b""))
        return found

    def halted(self, workspace: str) -> set[str]:
        return {command.scope for command in self.commands(workspace) if command.action == "halt"}

    def ledger(self) -> list[LedgerEntry]:
        """The ledger trimmed by origin, in the way the audit does it."""
        return self.entries

    def _trim(self, record: Record) -> None:
        for entry in LedgerBatch.model_validate_json(record.value or b"").entries:
            origin = (record.partition, entry.topic, entry.partition)
            if (entry.offset, entry.index) > self.reached.get(origin, (-1, -1)):
                self.reached[origin] = (entry.offset, entry.index)
                self.entries.append(entry)

    def charges(self, workspace: str) -> list[LedgerEntry]:
        return [entry for entry in self.ledger() if entry.kind == "charge" and entry.usage.workspace == workspace]

    def truth(self, workspace: str) -> Truth:
        """The oracle over the raw topic; a call's id is unique here, so that order does not matter."""
        values = []
        for record in self.records[USAGE.name]:
            try:
                message = json.loads(record.value or b"")
            except ValueError:
                continue
            values += [
                json.dumps(usage).encode()
                for usage in message.get("usages", [message])
                if usage.get("workspace") == workspace
            ]
        return Truth.of(values)

    def emitters(self, workspace: str) -> set[str]:
        """The workers whose intake took in a workspace's usage."""
        name = f'"workspace":"{workspace}"'.encode()
        return {
            (record.header("ce_id") or b"").rpartition(b"/")[0].decode()
            for record in self.records[PACKED.name]
            if name in (record.value or b"")
        }

    def ready_workers(self, within_s: float = 3.0) -> set[str]:
        since_ms = (time.time() - within_s) * 1_000
        beats = [
            record
            for record in self.records[HEARTBEATS.name]
            if record.timestamp_ms > since_ms and record.value != JUNK
        ]
        return {beat.emitter for record in beats if (beat := Heartbeat.model_validate_json(record.value)).ready}

    async def check_sums(self, workspace: str, calls: int) -> None:
        """Wait for all charges, and compare each agent's with the raw topic, to the nano."""
        await self.until(lambda: len(self.charges(workspace)) >= calls, f"the charge of {calls} calls of {workspace}")
        truth = self.truth(workspace)
        assert truth.calls == calls
        charged: Counter[str] = Counter()
        for entry in self.charges(workspace):
            charged[f"agent:{entry.usage.agent_path}"] += entry.charge.cost_nanos
        assert charged == {scope: sums[0] for scope, sums in truth.spend.items() if scope.startswith("agent:")}
        assert len(self.charges(workspace)) == calls

    async def check_state(self, workspace: str) -> None:
        """Wait until the stored state of every scope is what the raw topic says."""
        truth = self.truth(workspace).spend
        await self.until(
            lambda: self.stored(workspace) == {scope: list(sums) for scope, sums in truth.items()}, "the state"
        )

    def stored(self, workspace: str) -> dict[str, list[int]]:
        latest: dict[bytes, bytes] = {}
        for topic in CHANGELOGS:
            for record in self.records[topic]:
                latest[topic.encode() + (record.key or b"")] = record.value or b""
        sums: dict[str, list[int]] = {}
        for key, value in latest.items():
            scope = key.partition(b"/")[2].decode()
            is_shared = key.startswith(CHANGELOGS[1].encode())
            if scope.partition(":")[2].partition("/")[0] != workspace or is_shared == scope.startswith("agent:"):
                continue
            spends = (
                [part.spend for part in decode_shared(value).parts.values()]
                if is_shared
                else [decode_scope(value).spend]
            )
            days = [totals for spend in spends for name, totals in spend.windows.items() if name.startswith("month@")]
            sums[scope] = [sum(column) for column in zip(*days, strict=True)]
        return sums


@asynccontextmanager
async def watching(deployed: Deployment, *topics: str) -> AsyncIterator[Watch]:
    """Follow the topics, everything that was there before included."""
    async with AsyncExitStack() as stack:
        producer = AIOKafkaProducer(**producer_options(deployed.broker, "scenario"))
        await producer.start()
        stack.push_async_callback(producer.stop)
        watch = Watch(producer)
        for topic in (*(topic.name for topic in WATCHED), *topics):
            follower = Follower(deployed.broker, topic, watch.take)
            follower.start()
            stack.push_async_callback(follower.stop)
            await asyncio.wait_for(follower.caught_up(), DEADLINE_S)
        yield watch


def usage(workspace: str, agent: str, number: int, **fields: Any) -> Usage:
    defaults: dict[str, Any] = {
        "id": f"{agent}-{number}",
        "ts": from_us(time.time_ns() // 1_000),
        "run": "run-1",
        "provider": "anthropic",
        "model": "claude",
        "tokens": Tokens(input=number % 7 + 1, output=number % 3),
    }
    return Usage(workspace=workspace, team=f"team-{number % 2}", agent=agent, **(defaults | fields))


def identity(workspace: str, agent: str) -> IdentitySettings:
    return IdentitySettings.from_env({}, workspace=workspace, team="team-0", agent=agent, run="run-1")


# -- the scenes ----------------------------------------------------------------------------------------------------


async def a_halt_arrives_signed_and_the_sums_are_exact(deployed: Deployment) -> None:
    space = "first"
    async with watching(deployed) as watch:
        amount = 100 * INPUT_NANOS
        await watch.apply(
            budget(f"agent:{space}/*/*", cap(amount, warn=[5_000]), name=f"{space}-agents"),
            budget(f"team:{space}/team-1", cap(40, unit="tokens"), name=f"{space}-team"),
        )
        guarded = GuardSettings.from_env({}, public_keys=PUBLIC)
        guard = Guard(identity(space, "metered"), deployed.broker, guarded)
        meter = Meter(identity(space, "metered"), deployed.broker, MeterSettings.from_env({}))
        try:
            await asyncio.to_thread(guard.check)  # may still go on
            for _ in range(10):
                meter.record(provider="anthropic", model="claude", input=5, output=1)
            for number in range(30):  # single and packed, on any partition, under any key
                await watch.emit(usage(space, f"a{number % 5}", number), partition=number % PARTITIONS, key=None)
            await watch.emit(*(usage(space, f"a{number % 5}", number) for number in range(100, 150)))
            halted = await asyncio.to_thread(guard.wait_halted, DEADLINE_S)
            assert isinstance(halted, Halted)
            assert halted.command.measure.spend >= amount
            assert halted.command.scope == f"agent:{space}/team-0/metered"
            try:
                await asyncio.to_thread(guard.check)
            except Halted as stopped:
                assert "reached its day cap of USD 0.0003" in str(stopped)  # noqa: PT017 - a guard raises in a thread
            else:
                raise AssertionError("the guard let a halted agent go on")
            await asyncio.to_thread(meter.flush)
        finally:
            await asyncio.to_thread(meter.close)
            await asyncio.to_thread(guard.close)
        await watch.check_sums(space, 10 + 30 + 50)
        one = 5 * INPUT_NANOS + OUTPUT_NANOS
        metered = [entry.charge.cost_nanos for entry in watch.charges(space) if entry.usage.agent == "metered"]
        assert metered == [one] * 10
        await watch.until(lambda: f"team:{space}/team-1" in watch.halted(space), "the team's halt")
        await watch.until(
            lambda: {"received", "enforced"} <= {entry.ack.state for entry in watch.ledger() if entry.ack},
            "the proof of the stop in the ledger",
        )


async def bad_bytes_on_every_topic_are_said_and_the_worker_goes_on(deployed: Deployment) -> None:
    space = "junk"
    async with watching(deployed) as watch:
        places = {}
        for topic in TOPICS:
            sent = await watch.producer.send_and_wait(topic.name, JUNK, key=b"\xffkey|")
            places[topic.name] = str(sent.offset).encode()
            if topic.cleanup == "delete":
                await watch.producer.send_and_wait(topic.name, None, key=b"nothing")

        def refused() -> set[str]:
            said = [dict(record.headers) for record in watch.records[DEAD_LETTERS.name] if record.value == JUNK]
            topics = [(headers.get("spendfuse-topic", b"").decode(), headers) for headers in said]
            return {
                topic
                for topic, headers in topics
                if topic in places
                and headers["spendfuse-offset"] == places[topic]
                and headers["spendfuse-reason"] != b""
            }

        await watch.until(lambda: refused() >= READ_BY_WORKERS - {DEAD_LETTERS.name}, "a dead letter of each topic")
        junk = int(places[DEAD_LETTERS.name])
        await watch.until(
            lambda: any(entry.kind == "rejected" and entry.offset == junk for entry in watch.ledger()),
            "the record of the junk among the dead letters",
        )
        await watch.apply(budget(f"agent:{space}/*/*", cap(1, unit="tokens"), name=space))
        await watch.emit(usage(space, "after", 1))
        await watch.until(lambda: watch.halted(space) != set(), "the halt after it")
        await watch.check_sums(space, 1)
    assert all(worker.alive for worker in deployed.running.values())
    log = "".join(worker.log for worker in deployed.running.values())
    assert '"refused"' in log
    no_error_was_lost(log)


def no_error_was_lost(log: str) -> None:
    """No task of a worker ended with an error that nobody looked at, and none was merely logged."""
    for sign in ("Traceback", "exception was never retrieved", "was never awaited"):
        assert sign not in log, log[max(0, log.find(sign) - 2_000) : log.find(sign) + 4_000]


async def no_record_batch_stops_a_worker_or_moves_its_offsets(deployed: Deployment, name: str) -> None:
    space, far = "batches", 1_000_000
    servers = deployed.broker.bootstrap_servers
    guard = Guard(identity(space, "victim"), deployed.broker, GuardSettings.from_env({}, public_keys=PUBLIC))
    try:
        async with watching(deployed) as watch:
            await watch.apply(budget(f"agent:{space}/*/*", cap(5, unit="tokens"), name=f"{space}-agents"))
            one = Tokens(input=1)
            named, packed, lying = (
                encode(usage(space, agent, 0, tokens=one)) for agent in ("named", "packed", "victim")
            )
            bad_name = raw_batches.record(named, [(b"\xff\xfe", b"v")])
            for topic in TOPICS:
                if topic.name.startswith("spendfuse.batches"):
                    continue  # the audit's, which is not part of this
                await raw_batches.produce(servers, topic.name, 0, raw_batches.batch(bad_name))
                await raw_batches.produce(servers, topic.name, 0, raw_batches.batch(raw_batches.record(lying, nth=far)))
            compressed = bytes(cramjam.zstd.compress(raw_batches.record(packed)))
            await raw_batches.produce(servers, USAGE.name, 0, raw_batches.batch(compressed, codec="zstd"))
            bomb = gzip.compress(raw_batches.record(b"0" * 2 * UNPACKED_BYTES_MAX))
            await raw_batches.produce(servers, USAGE.name, 0, raw_batches.batch(bomb, codec="gzip"))

            def reasons() -> list[str]:
                said = [dict(each.headers) for each in watch.records[DEAD_LETTERS.name]]
                return [
                    each["spendfuse-reason"].decode()
                    for each in said
                    if each.get("spendfuse-topic") == USAGE.name.encode()
                    and b"batch cannot be read" in each["spendfuse-reason"]
                ]

            await watch.until(lambda: len(reasons()) >= 2, "the dead letters of the batches")
            assert [str(far) in reasons()[0], str(UNPACKED_BYTES_MAX) in reasons()[1]] == [True, True]
            for number in range(2, 12, 2):  # of one team, which goes by the number
                await watch.emit(usage(space, "victim", number, tokens=one), partition=0)
            await watch.until(lambda: len(watch.charges(space)) >= 7, "the charge of every true usage")
            charged = Counter(entry.usage.agent for entry in watch.charges(space))
            assert charged == {"named": 1, "packed": 1, "victim": 5}
            halted = await asyncio.to_thread(guard.wait_halted, DEADLINE_S)
            assert isinstance(halted, Halted), "the guard reads on behind such a batch"
            former = deployed.running[name]
            await asyncio.to_thread(former.stop)
            no_error_was_lost(former.log)
            await asyncio.to_thread(deployed.only, name)
            await watch.emit(usage(space, "victim", 20, tokens=one), partition=0)
            await watch.until(lambda: len(watch.charges(space)) == 8, "a charge after a restart")
    finally:
        await asyncio.to_thread(guard.close)
    no_error_was_lost(deployed.running[name].log)


def a_worker_told_to_stop_leaves_in_order(deployed: Deployment, name: str) -> None:
    worker = deployed.running[name]
    assert worker.ready_file.exists()
    code = worker.stop(20.0)
    assert code == 0, worker.log_tail()
    assert not worker.ready_file.exists()
    log = worker.log
    assert "Unclosed" not in log
    assert "\x1b" not in log, "an escape for a terminal in a log"


async def emit_many(watch: Watch, space: str, numbers: Sequence[int], per_message: int, pause_s: float) -> None:
    for start in range(0, len(numbers), per_message):
        chunk = [usage(space, f"a{number % 20}", number) for number in numbers[start : start + per_message]]
        await watch.emit(*chunk, partition=start // per_message % PARTITIONS)
        await asyncio.sleep(pause_s)
    await watch.producer.flush()


def crossing(watch: Watch, space: str, tokens: int) -> set[str]:
    return {
        scope for scope, sums in watch.truth(space).spend.items() if scope.startswith("agent:") and sums[1] >= tokens
    }


async def a_worker_killed_in_the_middle_loses_and_repeats_nothing(deployed: Deployment, name: str) -> None:
    space, calls, tokens = "killed", 5_000, 500
    worker = deployed.running[name]
    async with watching(deployed, *CHANGELOGS) as watch:
        await watch.apply(
            budget(f"agent:{space}/*/*", cap(tokens, unit="tokens", window="month"), name=f"{space}-agents"),
            budget(f"workspace:{space}", cap(5_000, unit="tokens", window="month"), name=f"{space}-all"),
        )
        emitting = asyncio.create_task(emit_many(watch, space, range(calls), 10, 0.008))
        await watch.until(lambda: len(watch.charges(space)) > calls // 4, "a quarter of the charges")
        worker.kill()
        done = len(watch.charges(space))
        assert done < calls, "it was killed too late to prove anything"
        await emitting
        await asyncio.to_thread(deployed.only, name)
        await watch.check_sums(space, calls)
        await watch.check_state(space)
        expected = crossing(watch, space, tokens) | {f"workspace:{space}"}
        await watch.until(lambda: watch.halted(space) >= expected, "every halt that was due")
        assert watch.halted(space) == expected
        ids = defaultdict(set)
        for command in watch.commands(space):
            ids[command.key].add(command.id)
        assert all(len(same) == 1 for same in ids.values()), "a replay gives the same command again"
        commanded = {command.id for command in watch.commands(space)}
        await watch.until(
            lambda: commanded <= {entry.command.id for entry in watch.ledger() if entry.command},
            "the record of every command in the ledger",
        )
        print(f"killed after {done} of {calls} charges; {len(watch.records[LEDGER.name])} ledger messages")  # noqa: T201


async def two_workers_share_and_one_takes_over_from_the_other(deployed: Deployment, first: str, second: str) -> None:
    space = "shared"
    await asyncio.to_thread(deployed.only, first, second)
    async with watching(deployed, *CHANGELOGS) as watch:
        await watch.until(lambda: len(watch.ready_workers()) == 2, "the second worker's heartbeat")
        number = 0

        async def until_both() -> None:
            nonlocal number
            while len(watch.emitters(space)) < 2:
                await emit_many(watch, space, range(number, number + 40), 1, 0.005)
                number += 40

        await asyncio.wait_for(until_both(), DEADLINE_S)
        emitting = asyncio.create_task(emit_many(watch, space, range(number, number + 1_000), 5, 0.01))
        await watch.until(lambda: len(watch.charges(space)) > number + 100, "some charges of two workers")
        deployed.running[second].kill()
        killed_at = time.monotonic()
        await emitting
        await watch.check_sums(space, number + 1_000)
        print(f"taken over {time.monotonic() - killed_at:.1f} s after the kill")  # noqa: T201 - a measurement
        await watch.check_state(space)


async def halts_are_quick(deployed: Deployment, trips: int, p99_ms_max: float) -> None:
    space = "quick"
    async with watching(deployed) as watch:
        await watch.apply(budget(f"agent:{space}/*/*", cap(1, unit="tokens"), name=space))
        await watch.emit(usage(space, "first", 1))
        await watch.until(lambda: len(watch.commands(space)) == 1, "the first halt")
        for number in range(trips):
            await watch.emit(usage(space, f"q{number}", number))
            await asyncio.sleep(0.01)
        await watch.until(lambda: len(watch.commands(space)) == trips + 1, "a halt of each")
        lags = sorted(
            watch.arrived[(record.topic, record.partition, record.offset)] * 1_000
            - Command.model_validate_json(record.value or b"").cause.produced_at_ms
            for record in watch.records[COMMANDS.name]
            if f":{space}/".encode() in (record.key or b"") and b"/q" in (record.key or b"")
        )
    p50, p99 = lags[len(lags) // 2], lags[int(len(lags) * 0.99)]
    print(f"halt lag over {len(lags)} trips: p50 {p50:.0f} ms, p99 {p99:.0f} ms")  # noqa: T201 - the measurement
    assert p99 < p99_ms_max
