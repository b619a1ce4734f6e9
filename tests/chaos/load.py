"""The load of a chaos run: usages, packed and single, some twice, corrected or junk; and when each was charged."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from spendfuse.client.connection import producer_options
from spendfuse.client.follow import Follower, Record
from spendfuse.client.keys import Signer
from spendfuse.wire.signing import SIGNATURE_HEADER
from spendfuse.wire.topics import LEDGER, USAGE

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from spendfuse.settings import BrokerSettings

SPACE = "chaos"
AGENTS = 40
TEAMS = 4
TICK_S = 0.05
IN_FLIGHT_MAX = 500
RECENT_MAX = 2_000
RESEND_MAX = 50
DUPLICATES = 0.03
JUNK = 0.005
CORRECTED = 0.02
PACKED = 0.5
STALL_S = 0.3
"""Charges come several times a second: a longer silence is a stall."""


class Load:
    """Emits at a rate until told to stop, and watches the ledger for what was charged."""

    def __init__(self, broker: BrokerSettings, rate: int, partitions: int, chance: random.Random, key: str) -> None:
        """`rate` is in usages a second; `key` signs corrections."""
        self._signer = Signer.parse(key)
        self.broker = broker
        self.rate = rate
        self.partitions = partitions
        self.sent = self.duplicates = self.corrections = self.junk = self.send_failures = 0
        self.waiting: dict[int, float] = {}
        self.charged: set[int] = set()
        self.stalls: list[tuple[float, float]] = []
        self.waits: list[tuple[float, float]] = []
        self._arrived_at = 0.0
        self._chance = chance
        self._recent: deque[bytes] = deque(maxlen=RECENT_MAX)
        self._stopping = asyncio.Event()
        self._in_flight: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Emit until `stop`; every usage is on the topic when this returns."""
        producer = AIOKafkaProducer(**producer_options(self.broker, "chaos-load"))
        await producer.start()
        try:
            async with Follower(self.broker, LEDGER.name, self._on_ledger):
                self._arrived_at = time.monotonic()
                while not self._stopping.is_set():
                    await self._tick(producer)
                    await asyncio.sleep(TICK_S)
                await asyncio.gather(*self._in_flight)
        finally:
            await producer.stop()

    def stop(self) -> None:
        """Emit nothing more."""
        self._stopping.set()

    def behind(self, mark: int) -> bool:
        """Say whether a usage up to a number is on the topic and not yet charged."""
        return any(number <= mark for number in self.waiting)

    async def _tick(self, producer: AIOKafkaProducer) -> None:
        due = max(1, round(self.rate * TICK_S))
        while due and len(self._in_flight) < IN_FLIGHT_MAX:
            count = min(due, self._chance.randint(2, 5)) if self._chance.random() < PACKED else 1
            due -= count
            numbers = range(self.sent, self.sent + count)
            self.sent += count
            usages = [_usage(number) for number in numbers]
            value = json.dumps(usages[0] if count == 1 else {"usages": usages}).encode()
            self._recent.append(value)
            self._put(producer, value, numbers)
            if self._chance.random() < DUPLICATES:
                self.duplicates += 1
                self._put(producer, self._chance.choice(self._recent), range(0))
            if self._chance.random() < CORRECTED:
                self._correct(producer, usages[0])
            if self._chance.random() < JUNK:
                self.junk += 1
                self._put(producer, b"\xff not usage", range(0))

    def _correct(self, producer: AIOKafkaProducer, usage: dict[str, Any]) -> None:
        """Correct a usage upwards, so that what has halted must still have; sometimes twice."""
        self.corrections += 1
        key = f"{usage['workspace']}/{usage['team']}/{usage['agent']}".encode()
        same = {name: usage[name] for name in ("ts", "workspace", "team", "agent", "run", "provider", "model")}
        fix = same | {
            "type": "correction", "id": f"fix-{usage['id']}", "usage_id": usage["id"], "at": usage["ts"],
            "tokens": {"output": 2}, "cost_nanos": 7, "currency": "USD", "reason": "provider_final", "by": "chaos",
        }  # fmt: skip
        value = json.dumps(fix).encode()
        headers = [(SIGNATURE_HEADER, self._signer.sign(USAGE.name, key, value))]
        for _ in range(self._chance.choice((1, 1, 2))):
            self._put(producer, value, range(0), key, headers)

    def _put(
        self,
        producer: AIOKafkaProducer,
        value: bytes,
        numbers: range,
        key: bytes | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
    ) -> None:
        partition = self._chance.randrange(self.partitions)
        task = asyncio.create_task(self._send(producer, value, partition, numbers, key, headers))
        self._in_flight.add(task)
        task.add_done_callback(self._in_flight.discard)

    async def _send(
        self,
        producer: AIOKafkaProducer,
        value: bytes,
        partition: int,
        numbers: range,
        key: bytes | None,
        headers: Sequence[tuple[str, bytes]],
    ) -> None:
        for _ in range(RESEND_MAX):  # as an emitter does: what may have arrived is sent again, with the same ids
            try:
                await producer.send_and_wait(USAGE.name, value, key, partition=partition, headers=list(headers))
            except KafkaError:
                self.send_failures += 1
                await asyncio.sleep(TICK_S)
                continue
            now = time.monotonic()
            self.waiting.update({number: now for number in numbers if number not in self.charged})
            return
        raise RuntimeError(f"the broker refused a usage {RESEND_MAX} times")

    def _on_ledger(self, record: Record) -> None:
        entries = json.loads(record.value or b"")["entries"]
        numbers = [
            int(entry["usage"]["id"].rpartition("-")[2])
            for entry in entries
            if entry["kind"] in {"charge", "duplicate"}
        ]
        if not numbers:
            return
        now = time.monotonic()
        if not self._stopping.is_set() and now - self._arrived_at > STALL_S:
            self.stalls.append((self._arrived_at, now))
        self._arrived_at = now
        self.charged.update(numbers)
        for number in numbers:
            sent_at = self.waiting.pop(number, now)
            if now - sent_at > STALL_S:
                self.waits.append((sent_at, now))


def _usage(number: int) -> dict[str, Any]:
    agent = number * 7 % AGENTS
    now_us = time.time_ns() // 1_000
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now_us // 1_000_000))
    return {
        "id": f"call-{number}",
        "ts": f"{stamp}.{now_us % 1_000_000:06d}Z",
        "workspace": SPACE,
        "team": f"team-{agent % TEAMS}",
        "agent": f"agent-{agent}",
        "run": f"run-{agent % 10}",
        "provider": "anthropic",
        "model": "claude",
        "tokens": {"input": number % 7 + 1, "output": number % 3},
    }
