"""What one worker takes: usages waiting in `usage.v1`, single and packed, until every charge is on the ledger.

    python tests/bench/throughput.py [--broker embedded|kafka] [--usages 50000] [--agents 100]

Prints usages a second by the clock and by the worker's CPU time. Intake, meter, rollup and recorder are all on, with a
budget for every agent, team and workspace; the ledger must hold exactly every usage, or the run fails.
"""

import argparse
import asyncio
import json
import time

import psutil
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from platform_under_test import PARTITIONS, Platform, platform, publish_budgets

from spendfuse.client.connection import consumer_options, producer_options
from spendfuse.wire.base import encode, from_us
from spendfuse.wire.budget import Budget, Cap, WindowSpec
from spendfuse.wire.topics import LEDGER, USAGE
from spendfuse.wire.usage import Tokens, Usage, UsagePack

PACK = 100
DEADLINE_S = 300.0
COST_NANOS = 36_450_000
TOKENS = Tokens(input=1_200, cache_read=17_000, cache_write_5m=1_000, cache_write_1h=2_000, output=800)


def usages(count: int, agents: int) -> list[Usage]:
    """Return usages of many agents, now."""
    ts = from_us(time.time_ns() // 1_000)
    return [
        Usage(
            id=f"bench-{number}", ts=ts, workspace="acme", team="research", agent=f"agent-{number % agents}",
            run=f"run-{number % agents}", root_run="root", provider="anthropic", model="claude-sonnet-4-6",
            tokens=TOKENS,
        )
        for number in range(count)
    ]  # fmt: skip


def budgets() -> list[Budget]:
    """Return budgets that are looked at for every usage and never reached."""
    cap = Cap(id="day", unit="nano-USD", amount=10**18, window=WindowSpec(kind="day"), warn=[5_000])
    tokens = Cap(id="tokens", unit="tokens", amount=10**17, window=WindowSpec(kind="rolling", rolling_s=3_600))
    scopes = {"agents": "agent:acme/research/*", "team": "team:acme/research", "workspace": "workspace:acme"}
    return [Budget(id=name, version=1, scope=scope, caps=[cap, tokens]) for name, scope in scopes.items()]


async def produce(run: Platform, messages: list[tuple[bytes, bytes]]) -> None:
    """Write messages as fast as the broker takes them."""
    async with AIOKafkaProducer(**producer_options(run.broker, "bench")) as producer:
        for start in range(0, len(messages), 1_000):
            sent = [await producer.send(USAGE.name, value, key=key) for key, value in messages[start : start + 1_000]]
            await asyncio.gather(*sent)


async def ledger_charges(run: Platform, wanted: int) -> tuple[int, int]:
    """Return (charges, nano-dollars) of the ledger once it holds as many as wanted, or at the deadline."""
    consumer = AIOKafkaConsumer(**consumer_options(run.broker, "bench"))
    await consumer.start()
    consumer.assign([TopicPartition(LEDGER.name, number) for number in range(PARTITIONS)])
    charges = nanos = 0
    deadline = time.monotonic() + DEADLINE_S
    try:
        while charges < wanted and time.monotonic() < deadline:
            for records in (await consumer.getmany(timeout_ms=200)).values():
                for record in records:
                    for entry in json.loads(record.value)["entries"]:
                        if entry["kind"] == "charge":
                            charges += 1
                            nanos += entry["charge"]["cost_nanos"]
    finally:
        await consumer.stop()
    return charges, nanos


def measure(kind: str, count: int, agents: int, *, packed: bool) -> tuple[float, float]:
    """Return usages a second by the clock and by the worker's CPU time."""
    made = usages(count, agents)
    if packed:
        packs = [made[start : start + PACK] for start in range(0, count, PACK)]
        messages = [(b"pack", encode(UsagePack(usages=pack))) for pack in packs]
    else:
        messages = [(usage.agent_path.encode(), encode(usage)) for usage in made]
    with platform(kind) as run:
        asyncio.run(publish_budgets(run.broker, budgets()))
        with run.worker() as worker:
            process = psutil.Process(worker.pid)
            asyncio.run(produce(run, messages[:1]))  # the first message finds connections open and code warm
            asyncio.run(ledger_charges(run, len(made) // len(messages)))
            cpu_before, began = sum(process.cpu_times()[:2]), time.monotonic()
            asyncio.run(produce(run, messages[1:]))
            produced = time.monotonic()
            charges, nanos = asyncio.run(ledger_charges(run, count))
            ended, cpu = time.monotonic(), sum(process.cpu_times()[:2]) - cpu_before
        if charges != count or nanos != count * COST_NANOS:
            raise SystemExit(f"the ledger holds {charges} of {count} charges, {nanos} of {count * COST_NANOS} nano-USD")
    print(f"    produced in {produced - began:.1f} s, all charged after {ended - began:.1f} s, worker CPU {cpu:.1f} s")
    return count / (ended - began), count / cpu


def main() -> None:
    """Measure single and packed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", choices=["embedded", "kafka"], default="kafka")
    parser.add_argument("--usages", type=int, default=50_000)
    parser.add_argument("--agents", type=int, default=100)
    given = parser.parse_args()
    for packed in (False, True):
        wall, cpu = measure(given.broker, given.usages, given.agents, packed=packed)
        form = f"packed by {PACK}" if packed else "single"
        print(f"{given.broker}, {given.agents} agents, {form}: {wall:,.0f} usages/s, {cpu:,.0f} per worker CPU-second")


if __name__ == "__main__":
    main()
