"""What a core takes: the worker beside a bare consumer and two peers' bare windowed sums, over the same messages.

    python tests/bench/throughput.py [--usages 100000] [--agents 100,100000] [--rounds 3] [--only spendfuse,aiokafka]

On one real Apache Kafka, in turn: `aiokafka` reads and adds up in a dict (the ceiling of a Python consumer);
`quixstreams` and `bytewax` keep a windowed sum, and check, price and judge nothing; `spendfuse` is a whole worker
(validate, remember ids, price, windows of four scopes, caps, ledger and state durable), with a budget for every agent,
team and workspace. Each reads a topic of its own that holds the same bytes: it is stopped (SIGSTOP) while they are
written, and measured from its continuation until all are counted, or are on the ledger. The sums must be exact.

Printed are usages a second by the process's CPU time (all threads) and by the clock, the median of the rounds, and the
ratio to quixstreams within each round. After the rounds one more worker is sampled, for a table of where its time goes.
Packed messages hold 100 usages of one agent, as a Meter sends them; where the
agents are too many for that, of 100 agents, as a forwarder sends them.
"""

import argparse
import asyncio
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from isolated import NotInstalledError, environment
from platform_under_test import PARTITIONS, Platform, platform, publish_budgets
from where_time_goes import sampled, shares

from spendfuse.client.connection import admin_options, consumer_options, producer_options
from spendfuse.wire.base import encode, from_us
from spendfuse.wire.budget import Budget, Cap, WindowSpec
from spendfuse.wire.topics import LEDGER, USAGE
from spendfuse.wire.usage import Tokens, Usage, UsagePack

PACK = 100
DEADLINE_S = 300.0
SHARE_MIN = 0.01
COST_NANOS = 36_450_000
TOKENS = Tokens(input=1_200, cache_read=17_000, cache_write_5m=1_000, cache_write_1h=2_000, output=800)
BARE_SUMS = Path(__file__).with_name("bare_sums.py")
NAMES = ("aiokafka", "quixstreams", "bytewax", "spendfuse")
SESSION_TIMEOUT_MS = "60000"
"""Longer than a process is stopped for while its messages are written."""


class Rate(NamedTuple):
    """Usages a second, by the process's CPU time and by the clock."""

    cpu: float
    wall: float


def usages(count: int, agents: int, run: str = "bench") -> list[Usage]:
    """Return usages of many agents, now; those of an agent lie together, 100 at a time, while that reaches them all."""
    ts, together = from_us(time.time_ns() // 1_000), PACK if agents * PACK <= count else 1
    numbers = [(number, number // together % agents) for number in range(count)]
    return [
        Usage(
            id=f"{run}-{number}", ts=ts, workspace="acme", team="research", agent=f"agent-{agent}",
            run=f"run-{agent}", root_run="root", provider="anthropic", model="claude-sonnet-4-6",
            tokens=TOKENS,
        )
        for number, agent in numbers
    ]  # fmt: skip


def budgets() -> list[Budget]:
    """Return budgets that are looked at for every usage and never reached."""
    cap = Cap(id="day", unit="nano-USD", amount=10**18, window=WindowSpec(kind="day"), warn=[5_000])
    tokens = Cap(id="tokens", unit="tokens", amount=10**17, window=WindowSpec(kind="rolling", rolling_s=3_600))
    scopes = {"agents": "agent:acme/research/*", "team": "team:acme/research", "workspace": "workspace:acme"}
    return [Budget(id=name, version=1, scope=scope, caps=[cap, tokens]) for name, scope in scopes.items()]


def messages(made: list[Usage], *, packed: bool) -> list[tuple[bytes, bytes]]:
    """Return (key, value) of each message; single usages of the agents are interleaved."""
    if packed:
        packs = [made[start : start + PACK] for start in range(0, len(made), PACK)]
        return [(pack[0].agent_path.encode(), encode(UsagePack(usages=pack))) for pack in packs]
    return [(usage.agent_path.encode(), encode(usage)) for start in range(PACK) for usage in made[start::PACK]]


async def produce(run: Platform, topic: str, made: list[tuple[bytes, bytes]]) -> None:
    """Write messages as fast as the broker takes them."""
    async with AIOKafkaProducer(**producer_options(run.broker, "bench")) as producer:
        for start in range(0, len(made), 1_000):
            sent = [await producer.send(topic, value, key=key) for key, value in made[start : start + 1_000]]
            await asyncio.gather(*sent)


async def make_topic(run: Platform, name: str) -> None:
    """Make a topic like `usage.v1`."""
    admin = AIOKafkaAdminClient(**admin_options(run.broker, "bench"))
    await admin.start()
    try:
        await admin.create_topics([NewTopic(name, PARTITIONS, 1)])
    finally:
        await admin.close()


class Ledger:
    """What the ledger has come to hold since `mark`."""

    def __init__(self, run: Platform) -> None:
        """Take the platform."""
        self._options = consumer_options(run.broker, "bench")
        self._places = [TopicPartition(LEDGER.name, number) for number in range(PARTITIONS)]
        self._from: dict[TopicPartition, int] = {}

    @contextlib.asynccontextmanager
    async def _consumer(self) -> "AsyncIterator[AIOKafkaConsumer]":
        consumer = AIOKafkaConsumer(**self._options)
        await consumer.start()
        try:
            consumer.assign(self._places)
            yield consumer
        finally:
            await consumer.stop()

    async def mark(self) -> None:
        """Count from here."""
        async with self._consumer() as consumer:
            self._from = await consumer.end_offsets(self._places)

    async def until(self, wanted: int) -> tuple[int, int]:
        """Return (charges, nano-dollars) once there are as many charges as wanted, or at the deadline.

        While it waits it only counts, to leave the processor to what is measured; the sum is made afterwards.
        """
        values: list[bytes] = []
        charges = 0
        deadline = time.monotonic() + DEADLINE_S
        async with self._consumer() as consumer:
            for place in self._places:
                consumer.seek(place, self._from[place])
            while charges < wanted and time.monotonic() < deadline:
                for records in (await consumer.getmany(timeout_ms=200)).values():
                    values += [record.value for record in records]
                    charges += sum(record.value.count(b'"kind":"charge"') for record in records)
        self.ended_at = time.monotonic()
        entries = [entry for value in values for entry in json.loads(value)["entries"] if entry["kind"] == "charge"]
        return len(entries), sum(entry["charge"]["cost_nanos"] for entry in entries)


def drained(
    process: psutil.Process,
    write: Callable[[], None],
    wait: Callable[[], float],
    count: int,
    samples: Path | None = None,
) -> Rate:
    """Write the messages while a process is stopped, and return at what rate it takes them; sampled, if into a file."""
    process.suspend()
    write()
    if samples is not None:
        with sampled(process.pid, samples):
            return _resumed(process, wait, count)
    return _resumed(process, wait, count)


def _resumed(process: psutil.Process, wait: Callable[[], float], count: int) -> Rate:
    cpu_before, began = sum(process.cpu_times()[:2]), time.monotonic()
    process.resume()
    ended = wait()
    return Rate(count / (sum(process.cpu_times()[:2]) - cpu_before), count / (ended - began))


def measure_spendfuse(run: Platform, made: list[Usage], *, packed: bool, samples: Path | None = None) -> Rate:
    """Return the rate of a worker; the ledger must hold every charge, to the nano-dollar."""
    ledger, count = Ledger(run), len(made) - 1

    def wait() -> float:
        charges, nanos = asyncio.run(ledger.until(count))
        if charges != count or nanos != count * COST_NANOS:
            raise SystemExit(f"the ledger holds {charges} of {count} charges, {nanos} of {count * COST_NANOS} nano-USD")
        return ledger.ended_at

    with run.worker(SPENDFUSE_SESSION_TIMEOUT_MS=SESSION_TIMEOUT_MS) as worker:
        asyncio.run(ledger.mark())
        asyncio.run(produce(run, USAGE.name, messages(made[:1], packed=False)))  # connections open, code warm
        asyncio.run(ledger.until(1))
        asyncio.run(ledger.mark())
        made_messages = messages(made[1:], packed=packed)
        process = psutil.Process(worker.pid)
        return drained(process, lambda: asyncio.run(produce(run, USAGE.name, made_messages)), wait, count, samples)


def measure_peer(run: Platform, name: str, made: list[Usage], *, packed: bool, topic: str) -> Rate:
    """Return the rate of a peer; its sum must be exact."""
    asyncio.run(make_topic(run, topic))
    asyncio.run(produce(run, topic, messages(made[:1], packed=False)))
    count = len(made) - 1
    python = Path(sys.executable) if name == "aiokafka" else environment("peers")
    argv = [python, BARE_SUMS, name, run.broker.bootstrap_servers, topic, topic, str(count)]
    argv += ["mixed"] if packed and made[0].agent != made[1].agent else []
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as peer:
        lines = iter(peer.stdout or ())
        try:
            if next(lines, "").strip() != "ready":
                raise SystemExit(f"{name} ended before it read anything")
            made_messages = messages(made[1:], packed=packed)

            def wait() -> float:
                said = next(lines, "").split()
                if said != ["done", str(len(made) * TOKENS.output)]:
                    raise SystemExit(f"{name} said {said}, not the sum {len(made) * TOKENS.output}")
                return time.monotonic()

            return drained(
                psutil.Process(peer.pid), lambda: asyncio.run(produce(run, topic, made_messages)), wait, count
            )
        finally:
            peer.send_signal(signal.SIGCONT)
            peer.kill()


def interleaved(run: Platform, names: Sequence[str], count: int, agents: int, rounds: int) -> None:
    """Measure every contestant in turn, rounds times, single and packed, and print the table."""
    for packed in (False, True):
        rates: dict[str, list[Rate]] = {name: [] for name in names}
        for nth in range(rounds):
            for name in [*names[nth % len(names) :], *names[: nth % len(names)]]:
                title = f"bench-{agents}-{packed:d}-{nth}-{name}"
                made = usages(count + 1, agents, title)
                if name == "spendfuse":
                    rate = measure_spendfuse(run, made, packed=packed)
                else:
                    rate = measure_peer(run, name, made, packed=packed, topic=title)
                rates[name].append(rate)
                if sys.stderr.isatty():
                    print(f"  {title}: {rate.cpu:,.0f} per CPU-second", file=sys.stderr)
        form = f"packed by {PACK}" if packed else "single"
        print(f"\n{count:,} usages of {agents:,} agents, {form}, {rounds} round(s), real Kafka", flush=True)
        print(f"{'':12} {'per CPU-second':>15} {'by the clock':>13} {'to quixstreams':>15}")
        for name in names:
            cpu, wall = (statistics.median(column) for column in zip(*rates[name], strict=True))
            ratio = "-"
            if "quixstreams" in names:
                pairs = zip(rates[name], rates["quixstreams"], strict=True)
                ratio = f"{statistics.median(ours.cpu / theirs.cpu for ours, theirs in pairs):.2f}"
            print(f"{name:12} {cpu:>15,.0f} {wall:>13,.0f} {ratio:>15}", flush=True)
        if "spendfuse" in names:
            with contextlib.suppress(NotInstalledError):
                where(run, usages(count + 1, agents, f"where-{agents}-{packed:d}"), packed=packed)


def where(run: Platform, made: list[Usage], *, packed: bool) -> None:
    """Print where the time of one more worker goes, which is sampled and therefore not measured."""
    samples = run.directory / "samples"
    measure_spendfuse(run, made, packed=packed, samples=samples)
    print(f"{'':4}where the worker's time goes")
    for name, share in shares(samples):
        if share >= SHARE_MIN:
            print(f"{'':4}{share:6.1%}  {name}", flush=True)


def main() -> None:
    """Measure single and packed, with few agents and with many."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--usages", type=int, default=100_000)
    parser.add_argument("--agents", default="100,100000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(NAMES), help=f"some of {', '.join(NAMES)}")
    given = parser.parse_args()
    names = given.only.split(",")
    try:
        environment("peers")
    except NotInstalledError as error:
        print(f"without quixstreams and bytewax: {error}")
        names = [name for name in names if name in ("aiokafka", "spendfuse")]
    if unknown := set(names) - set(NAMES):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(NAMES)}")
    with platform("kafka") as run:
        asyncio.run(publish_budgets(run.broker, budgets()))
        for agents in given.agents.split(","):
            interleaved(run, names, given.usages, int(agents), given.rounds)


if __name__ == "__main__":
    main()
