"""What leaves the pipeline: signed commands, alerts, ledger batches, rollups and dead letters, as records."""

from collections.abc import Sequence
from typing import Final

from spendfuse.client.keys import Signer
from spendfuse.engine.orders import Effects
from spendfuse.pipeline.intake import REASON_CHARS_MAX, Round
from spendfuse.pipeline.records import Delivery, Headers, Outbox, SourceRecord
from spendfuse.pipeline.register import Kept
from spendfuse.pipeline.routing import partition_of
from spendfuse.wire.base import from_us
from spendfuse.wire.cloudevents import headers as cloud_headers
from spendfuse.wire.control import Alert, Command, Heartbeat
from spendfuse.wire.ledger import LEDGER_BATCH_MAX
from spendfuse.wire.remaining import Remaining
from spendfuse.wire.rollup import Rollup
from spendfuse.wire.signing import SIGNATURE_HEADER
from spendfuse.wire.topics import ALERTS, COMMANDS, DEAD_LETTERS, HEARTBEATS, LEDGER, PACKED, REMAINING, ROLLUPS

SOURCE: Final = "//spendfuse/worker"
INTAKE_SOURCE: Final = "//spendfuse/intake"
LEDGER_BYTES_MAX: Final = 900_000
"""Most bytes of one ledger message, under the topic's limit with its headers."""
DEAD_VALUE_BYTES_MAX: Final = 900_000
_LEDGER_HEAD: Final = b'{"v":1,"entries":['
_LEDGER_TAIL: Final = b"]}"


class Publisher:
    """Turns effects into records; `signer` is None only where commands may go unsigned (development)."""

    def __init__(self, outbox: Outbox, signer: Signer | None, partitions: int) -> None:
        """Take where records go, who signs, and how many partitions the deployment has."""
        self._outbox = outbox
        self._signer = signer
        self._partitions = partitions

    async def round(self, each: Round, emitter: str, now_us: int) -> list[Delivery]:
        """Publish one round of the intake: its dead letters, and one packed message for each partition."""
        now = from_us(now_us)
        sent = [await self.dead_letter(*dead) for dead in each.dead]
        for partition, value in each.packed.items():
            headers = cloud_headers("usage.packed.v1", INTAKE_SOURCE, f"{emitter}/{partition}", now)
            sent.append(
                await self._outbox.put(
                    PACKED.name, key=str(partition).encode(), value=value, partition=partition, headers=headers
                )
            )
        return sent

    async def effects(self, effects: Effects) -> list[Delivery]:
        """Publish commands first, then alerts."""
        sent = [await self.command(command) for command in effects.commands]
        sent += [await self.alert(alert) for alert in effects.alerts]
        return sent

    async def command(self, command: Command) -> Delivery:
        """Publish one command, signed over topic, key and value."""
        key, value = command.key.encode(), command.model_dump_json(exclude_none=True).encode()
        headers = cloud_headers("command.v1", SOURCE, command.id, command.issued_at)
        if self._signer is not None:
            headers.append((SIGNATURE_HEADER, self._signer.sign(COMMANDS.name, key, value)))
        return await self._outbox.put(COMMANDS.name, key=key, value=value, partition=0, headers=headers)

    async def again(self, kept: Kept, *, sign: bool) -> Delivery:
        """Publish a genuine command once more, byte for byte; `sign`: under our own signature in place of its."""
        headers = list(kept.headers)
        if sign and self._signer is not None:
            headers = [(name, value) for name, value in headers if name != SIGNATURE_HEADER]
            headers.append((SIGNATURE_HEADER, self._signer.sign(COMMANDS.name, kept.key, kept.value)))
        return await self._outbox.put(COMMANDS.name, key=kept.key, value=kept.value, partition=0, headers=headers)

    async def remaining(self, left: Remaining) -> Delivery:
        """Publish what is left of a cap, signed over topic, key and value."""
        key, value = left.key.encode(), left.model_dump_json(exclude_none=True).encode()
        headers = cloud_headers("remaining.v1", SOURCE, left.key, left.at)
        if self._signer is not None:
            headers.append((SIGNATURE_HEADER, self._signer.sign(REMAINING.name, key, value)))
        return await self._outbox.put(REMAINING.name, key=key, value=value, partition=0, headers=headers)

    async def heartbeat(self, beat: Heartbeat) -> Delivery:
        """Publish a sign of life, signed over topic, key and value."""
        key, value = beat.emitter.encode(), beat.model_dump_json(exclude_none=True).encode()
        headers = cloud_headers("heartbeat.v1", SOURCE, beat.emitter, beat.ts)
        if self._signer is not None:
            headers.append((SIGNATURE_HEADER, self._signer.sign(HEARTBEATS.name, key, value)))
        return await self._outbox.put(HEARTBEATS.name, key=key, value=value, partition=0, headers=headers)

    async def alert(self, alert: Alert) -> Delivery:
        """Publish one alert."""
        value = alert.model_dump_json(exclude_none=True).encode()
        headers = cloud_headers("alert.v1", SOURCE, alert.id, alert.ts)
        return await self._outbox.put(ALERTS.name, key=alert.scope.encode(), value=value, partition=0, headers=headers)

    async def ledger(self, partition: int, name: str, entries: Sequence[bytes], now_us: int) -> list[Delivery]:
        """Publish entries (`ledger_text`) in order on one ledger partition, in as few messages as their size allows."""
        if not entries:
            return []
        headers = cloud_headers("ledger.v1", SOURCE, name, from_us(now_us))
        return [
            await self._outbox.put(
                LEDGER.name, key=str(partition).encode(), value=value, partition=partition, headers=headers
            )
            for value in _ledger_values(entries)
        ]

    async def rollup(self, rollup: Rollup) -> Delivery:
        """Publish one partition's share of a shared scope, to the partition its scope lives on."""
        return await self._outbox.put(
            ROLLUPS.name,
            key=rollup.scope.encode(),
            value=rollup.model_dump_json(exclude_none=True).encode(),
            partition=partition_of(rollup.scope, self._partitions),
            headers=cloud_headers(
                "rollup.v1", SOURCE, f"{rollup.scope}@{rollup.partition}@{rollup.as_of}", from_us(rollup.newest_us)
            ),
        )

    async def dead_letter(
        self, record: SourceRecord, reason: str, value: bytes | None = None, nth: int = 0
    ) -> Delivery:
        """Publish what was refused: its bytes as they came, with reason and origin in the headers."""
        return await self._outbox.put(
            DEAD_LETTERS.name,
            key=f"{record.topic}/{record.partition}/{record.offset}".encode(),
            value=(record.value or b"" if value is None else value)[:DEAD_VALUE_BYTES_MAX],
            partition=0,
            headers=dead_letter_headers(record, reason, nth),
        )


def dead_letter_headers(record: SourceRecord, reason: str, nth: int) -> Headers:
    """Return reason and origin as headers; the reason is one line of printable characters."""
    line = "".join(char if char.isprintable() else " " for char in reason)[:REASON_CHARS_MAX]
    return [
        ("spendfuse-reason", line.encode()),
        ("spendfuse-topic", record.topic.encode()),
        ("spendfuse-partition", str(record.partition).encode()),
        ("spendfuse-offset", str(record.offset).encode()),
        ("spendfuse-index", str(nth).encode()),
    ]


def _ledger_values(entries: Sequence[bytes]) -> list[bytes]:
    values: list[bytes] = []
    batch: list[bytes] = []
    size = 0
    for text in entries:
        if batch and (size + len(text) > LEDGER_BYTES_MAX or len(batch) >= LEDGER_BATCH_MAX):
            values.append(_LEDGER_HEAD + b",".join(batch) + _LEDGER_TAIL)
            batch, size = [], 0
        batch.append(text)
        size += len(text) + 1
    values.append(_LEDGER_HEAD + b",".join(batch) + _LEDGER_TAIL)
    return values
