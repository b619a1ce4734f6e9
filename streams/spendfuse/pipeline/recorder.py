"""The recorder: commands, acks, alerts, budgets, prices and dead letters, copied into the ledger with their origin.

So the audit reads one topic. Copies may repeat after a crash; the audit trims them by origin.

A command is recorded as one only if its signature is right. Anything else among the commands goes to the dead letters,
from there into the ledger as `rejected`, and raises an alert of kind `forged`; what it was to displace in the compacted
topic is written again.
"""

import asyncio
import base64
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from re import fullmatch
from typing import Any, Final

from pydantic import ValidationError

from spendfuse.client.accept import Refused, scope_of
from spendfuse.client.follow import Record
from spendfuse.pipeline.feed import decode_budget, decode_price
from spendfuse.pipeline.intake import reason
from spendfuse.pipeline.ledger_text import entry_texts
from spendfuse.pipeline.proofs import claim
from spendfuse.pipeline.publish import Publisher
from spendfuse.pipeline.records import Delivery, SourceRecord
from spendfuse.pipeline.register import Kept, Register
from spendfuse.pipeline.routing import partition_of
from spendfuse.wire.base import SCOPE_PATTERN, from_us, to_us
from spendfuse.wire.control import Ack, Alert
from spendfuse.wire.ledger import LedgerEntry
from spendfuse.wire.topics import ACKS, ALERTS, BUDGETS, COMMANDS, DEAD_LETTERS, PRICES

RECORDED: Final = (COMMANDS, ACKS, ALERTS, BUDGETS, PRICES, DEAD_LETTERS)
REJECTED_BYTES_MAX: Final = 4_096
"""Most bytes of a refused record that the ledger keeps; the dead-letter topic has them all."""
US_PER_MS: Final = 1_000
AT_MS_MAX: Final = 253_370_764_800_000
"""The year 9999 in ms since the epoch; a later Kafka timestamp (its producer chose it) is not a time."""


REPLAY_AFTER_MS: Final = 600_000
"""An old command written so long after the one that replaced it is a replay; sooner, a resend after a crash."""
SLICE: Final = 20
"""Records looked at before others have their turn: a signature costs an eighth of a millisecond."""
NOBODY: Final = "workspace:unknown"
"""The scope of an alert about a record whose key names none."""


async def record(
    records: Sequence[SourceRecord], publisher: Publisher, partitions: int, now_us: int, register: Register
) -> tuple[list[Delivery], list[tuple[SourceRecord, str]]]:
    """Copy records of one partition into the ledger; return the deliveries, and what was refused with the reason."""
    deliveries: list[Delivery] = []
    entries: list[LedgerEntry] = []
    refused: list[tuple[SourceRecord, str]] = []
    for nth, each in enumerate(records):
        if nth % SLICE == 0:
            await asyncio.sleep(0)  # a flood of signatures to check must not hold back a halt
        entry, fault = ledger_entry(each, now_us, register)
        entry, proof, fault = _with_proof(each, entry, fault, register)
        if entry is not None:
            entries.append(entry)
            if proof is not None:
                entries.append(proof)
        else:
            refused.append((each, fault or "unreadable"))
            deliveries.append(await publisher.dead_letter(*refused[-1]))
    if entries:
        first = records[0]
        name = f"{first.topic}/{first.partition}/{first.offset}"
        deliveries += await publisher.ledger(
            partition_of(first.topic, partitions), name, entry_texts(entries), to_us(entries[0].at)
        )
    if records[0].topic == COMMANDS.name:
        deliveries += [await publisher.alert(alert) for alert in forgery_alerts(records, refused, register, now_us)]
        # What a retiring key signed (it may be retired by now) is written under our own.
        for kept in displaced(records, refused, register):
            deliveries.append(await publisher.again(kept, sign=register.is_retiring(kept)))
    return deliveries, refused


def ledger_entry(record: SourceRecord, now_us: int, register: Register) -> tuple[LedgerEntry | None, str | None]:
    """Return the entry of a record, or the reason why it is none; total over any bytes."""
    try:
        if record.topic == COMMANDS.name:
            fields: dict[str, Any] = {"kind": "command", "command": register.accept(record)}
        else:
            fields = _FIELDS[record.topic](record)
    except Refused as refusal:
        return None, str(refusal)
    except ValidationError as error:
        return None, reason(error)
    except ValueError as error:
        return None, str(error)
    at_us = record.timestamp_ms * US_PER_MS if 0 < record.timestamp_ms < AT_MS_MAX else now_us
    return LedgerEntry(
        topic=record.topic, partition=record.partition, offset=record.offset, at=from_us(at_us), **fields
    ), None


def _with_proof(
    record: SourceRecord, entry: LedgerEntry | None, fault: str | None, register: Register
) -> tuple[LedgerEntry | None, LedgerEntry | None, str | None]:
    """Return an entry, beside an ack what proves or else claims more of it, and the fault of a pretended proof."""
    if entry is None or entry.ack is None:
        return entry, None, fault
    try:
        data = register.guards.proof(record, entry.ack)
    except ValueError as error:
        return None, None, str(error)
    kind = "claim" if data is None else "proof"
    data = data or claim(entry.ack)
    if data is None:
        return entry, None, None
    values = {"kind": kind, "ack": None, "data": data, "index": entry.index + 1}
    return entry, entry.model_copy(update=values), None


def forgery_alerts(
    records: Sequence[SourceRecord], refused: Sequence[tuple[SourceRecord, str]], register: Register, now_us: int
) -> list[Alert]:
    """Return one alert for each kind of fault in one read of the commands: a flood of records is no flood of alerts."""
    if register.verifier is None:
        return []  # where commands go unsigned there is no telling who wrote one
    kinds = Counter(fault.partition(":")[0] for _, fault in refused)
    alerts = []
    for record, fault in refused:
        if count := kinds.pop(fault.partition(":")[0], 0):
            alerts.append(
                _forged(record, f"a record that nobody with a key wrote ({fault})", "critical", count, now_us)
            )
    replays = [record for record in records if _is_replay(record, register)]
    if replays:
        what = "an old command that was written again after the one that replaced it"
        alerts.append(_forged(replays[0], what, "warning", len(replays), now_us))
    return alerts


def displaced(
    records: Sequence[SourceRecord], refused: Sequence[tuple[SourceRecord, str]], register: Register
) -> list[Kept]:
    """Return the genuine commands to be written again after one read.

    Those of which this read leaves something else as the last record of their key, and those that it found signed by a
    key that is being retired.
    """
    if register.verifier is None:
        return []
    bad = {record.offset for record, _ in refused}
    found = []
    for record in {record.key: record for record in records}.values():
        kept = register.latest(record.key)
        if kept is None or record.offset < kept.offset:
            continue
        if record.offset in bad or record.value != kept.value or register.is_retiring(kept):
            found.append(kept)
    return found


def _is_replay(record: SourceRecord, register: Register) -> bool:
    kept = register.latest(record.key)
    if kept is None or record.offset <= kept.offset or record.timestamp_ms - kept.timestamp_ms < REPLAY_AFTER_MS:
        return False
    try:
        return register.accept(record).seq < kept.command.seq
    except Refused:
        return False


def _forged(record: SourceRecord, what: str, severity: Any, count: int, now_us: int) -> Alert:
    named = scope_of(Record(*record[:6]))
    scope = named if fullmatch(SCOPE_PATTERN, named) else NOBODY
    place = f"{record.topic}/{record.partition}/{record.offset}"
    text = (
        f"At {place} lies {what}; {count:,} such in this read. Guards refuse it. Find out who may write to "
        f"{COMMANDS.name} beside the workers."
    )
    return Alert(
        id=sha256(f"forged|{place}|{what}".encode()).hexdigest()[:32],
        ts=from_us(now_us),
        kind="forged",
        severity=severity,
        scope=scope,
        message="".join(char if char.isprintable() else " " for char in text)[:512],
    )


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
    ACKS.name: _ack,
    ALERTS.name: _alert,
    BUDGETS.name: _budget,
    PRICES.name: _price,
    DEAD_LETTERS.name: _rejected,
}
