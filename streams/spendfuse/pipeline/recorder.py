"""The recorder: commands, acks, alerts, budgets, prices and dead letters, copied into the ledger with their origin.

So the audit reads one topic. Copies may repeat after a crash; the audit trims them by origin.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from pydantic import ValidationError

from spendfuse.pipeline.feed import decode_budget, decode_price
from spendfuse.pipeline.intake import reason
from spendfuse.pipeline.publish import Publisher
from spendfuse.pipeline.records import Delivery, SourceRecord
from spendfuse.pipeline.routing import partition_of
from spendfuse.wire.base import from_us
from spendfuse.wire.control import Ack, Alert, Command
from spendfuse.wire.ledger import LedgerEntry
from spendfuse.wire.topics import ACKS, ALERTS, BUDGETS, COMMANDS, DEAD_LETTERS, PRICES

RECORDED: Final = (COMMANDS, ACKS, ALERTS, BUDGETS, PRICES, DEAD_LETTERS)
REJECTED_BYTES_MAX: Final = 4_096
"""Most bytes of a refused record that the ledger keeps; the dead-letter topic has them all."""
US_PER_MS: Final = 1_000
AT_MS_MAX: Final = 253_370_764_800_000
"""The year 9999 in ms since the epoch; a later Kafka timestamp (its producer chose it) is not a time."""


async def record(
    records: Sequence[SourceRecord], publisher: Publisher, partitions: int, now_us: int
) -> tuple[list[Delivery], list[tuple[SourceRecord, str]]]:
    """Copy records of one partition into the ledger; return the deliveries, and what was refused with the reason."""
    deliveries: list[Delivery] = []
    entries: list[LedgerEntry] = []
    refused: list[tuple[SourceRecord, str]] = []
    for each in records:
        entry, fault = ledger_entry(each, now_us)
        if entry is not None:
            entries.append(entry)
        else:
            refused.append((each, fault or "unreadable"))
            deliveries.append(await publisher.dead_letter(*refused[-1]))
    if entries:
        first = records[0]
        name = f"{first.topic}/{first.partition}/{first.offset}"
        deliveries += await publisher.ledger(partition_of(first.topic, partitions), name, entries)
    return deliveries, refused


def ledger_entry(record: SourceRecord, now_us: int) -> tuple[LedgerEntry | None, str | None]:
    """Return the entry of a record, or the reason why it is none; total over any bytes."""
    try:
        fields = _FIELDS[record.topic](record)
    except ValidationError as error:
        return None, reason(error)
    except ValueError as error:
        return None, str(error)
    at_us = record.timestamp_ms * US_PER_MS if 0 < record.timestamp_ms < AT_MS_MAX else now_us
    return LedgerEntry(
        topic=record.topic, partition=record.partition, offset=record.offset, at=from_us(at_us), **fields
    ), None


def _command(record: SourceRecord) -> dict[str, Any]:
    if record.value is None:
        raise ValueError("a command cannot be a tombstone: it would carry no signature")
    command = Command.model_validate_json(record.value)
    if record.key != command.key.encode():
        raise ValueError(f"the key of a command must be {command.key!r}")
    return {"kind": "command", "command": command}


def _ack(record: SourceRecord) -> dict[str, Any]:
    return {"kind": "ack", "ack": Ack.model_validate_json(record.value or b"")}


def _alert(record: SourceRecord) -> dict[str, Any]:
    return {"kind": "alert", "alert": Alert.model_validate_json(record.value or b"")}


def _budget(record: SourceRecord) -> dict[str, Any]:
    key = (record.key or b"").decode("utf-8", "replace")
    if record.value is None:
        return {"kind": "budget", "data": {"key": key, "withdrawn": True}}
    budget = decode_budget(record.key, record.value)
    return {"kind": "budget", "data": budget.model_dump(mode="json", exclude_none=True)}


def _price(record: SourceRecord) -> dict[str, Any]:
    if record.value is None:
        return {"kind": "price", "data": {"key": (record.key or b"").decode("utf-8", "replace"), "withdrawn": True}}
    override = decode_price(record.key, record.value)
    return {"kind": "price", "data": override.model_dump(mode="json", exclude_none=True)}


def _rejected(record: SourceRecord) -> dict[str, Any]:
    headers = dict(record.headers)  # of a repeated name, the last

    def text(name: str) -> str:
        return (headers.get(name) or b"").decode("utf-8", "replace")[:1_000]  # Kafka allows a header without a value

    value = record.value or b""
    return {
        "kind": "rejected",
        "data": {
            "reason": text("spendfuse-reason"),
            "topic": text("spendfuse-topic"),
            "partition": text("spendfuse-partition"),
            "offset": text("spendfuse-offset"),
            "index": text("spendfuse-index"),
            "bytes": len(value),
            "value_base64": base64.b64encode(value[:REJECTED_BYTES_MAX]).decode(),
        },
    }


_FIELDS: Final[Mapping[str, Callable[[SourceRecord], dict[str, Any]]]] = {
    COMMANDS.name: _command,
    ACKS.name: _ack,
    ALERTS.name: _alert,
    BUDGETS.name: _budget,
    PRICES.name: _price,
    DEAD_LETTERS.name: _rejected,
}
