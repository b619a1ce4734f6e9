"""The recorder: commands, acks, alerts, budgets, prices and dead letters, copied into the ledger with their origin.

So the audit reads one topic. Copies may repeat after a crash; the audit trims them by origin.
"""

import base64
from collections.abc import Callable, Mapping
from typing import Any, Final

from pydantic import ValidationError

from spendfuse.pipeline.feed import decode_budget
from spendfuse.pipeline.intake import reason
from spendfuse.pipeline.records import SourceRecord
from spendfuse.wire.base import from_us
from spendfuse.wire.control import Ack, Alert, Command
from spendfuse.wire.ledger import LedgerEntry
from spendfuse.wire.prices import PriceOverride
from spendfuse.wire.topics import ACKS, ALERTS, BUDGETS, COMMANDS, DEAD_LETTERS, PRICES

RECORDED: Final = (COMMANDS, ACKS, ALERTS, BUDGETS, PRICES, DEAD_LETTERS)
REJECTED_BYTES_MAX: Final = 4_096
"""Most bytes of a refused record that the ledger keeps; the dead-letter topic has them all."""
US_PER_MS: Final = 1_000


def ledger_entry(record: SourceRecord, now_us: int) -> tuple[LedgerEntry | None, str | None]:
    """Return the entry of a record, or the reason why it is none; total over any bytes."""
    try:
        fields = _FIELDS[record.topic](record)
    except ValidationError as error:
        return None, reason(error)
    except ValueError as error:
        return None, str(error)
    at_us = record.timestamp_ms * US_PER_MS if record.timestamp_ms > 0 else now_us
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
    override = PriceOverride.model_validate_json(record.value)
    return {"kind": "price", "data": override.model_dump(mode="json", exclude_none=True)}


def _rejected(record: SourceRecord) -> dict[str, Any]:
    headers = dict(record.headers)  # of a repeated name, the last

    def text(name: str) -> str:
        return headers.get(name, b"").decode("utf-8", "replace")[:1_000]

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
