"""Sealed trails for the audit's tests: every kind of entry in two ledger partitions, batch by batch."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from audit_samples import START, ack_entry, charge, command_entry, correction, halt, message
from spendfuse.audit.batches import BatchHeader, Collector, Message, form_again
from spendfuse.audit.seal import GENESIS
from spendfuse.wire.control import Alert, Degrade
from spendfuse.wire.ledger import LedgerEntry

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from spendfuse.audit.batches import Batch

TOPIC = "spendfuse.ledger.v1"
WRITTEN_MS = 1_760_000_000_000
"""2025-10-09: when the ledger took the first message of a trail."""
ROWS_MAX = 12


def alert_entry(offset: int) -> LedgerEntry:
    """An alert with and without what it may have."""
    alert = Alert(
        id=f"{offset:032x}", ts=START + timedelta(minutes=offset), kind="violation", severity="warning",
        scope="team:acme/research", message="Ünïcode | line",
    )  # fmt: skip
    return LedgerEntry(
        kind="alert", topic="spendfuse.alerts.v1", partition=0, offset=offset, at=alert.ts, alert=alert
    )  # fmt: skip


def event_entry(kind: str, offset: int) -> LedgerEntry:
    """A budget, a price, a refusal or an operator's doing."""
    return LedgerEntry(
        kind=kind,  # type: ignore[arg-type]
        topic=f"spendfuse.{kind}.v1", partition=0, offset=offset, at=START,
        data={"id": f"{kind}-{offset}", "n": [1, None]},
    )  # fmt: skip


def entries(partition: int) -> list[LedgerEntry]:
    """Some of everything, with the values that are awkward: empty, long, no number, many tags."""
    order, bare = halt(1), halt(2, measure=None, cause=None, window=None, expires_at=START + timedelta(days=1))
    degrade = halt(3, action="degrade", degrade=Degrade(models={"z": "a", "a": "z"}, max_output_tokens=100))
    return [
        *(charge(nth, partition=partition) for nth in range(20)),
        charge(20, partition=partition, tags={}, workflow=None, source="s" * 400),
        charge(21, partition=partition, kind="duplicate", tags={f"t{nth}": "é" * 100 for nth in range(15, -1, -1)}),
        command_entry(order, 0), command_entry(bare, 1), command_entry(degrade, 2, "decision"),
        ack_entry(order, 0, "received", START), ack_entry(order, 1, "enforced", START, halt_lag_us=12_345),
        alert_entry(0),
        *(event_entry(kind, nth) for nth, kind in enumerate(("budget", "price", "rejected", "operator"))),
        *(charge(nth, partition=partition) for nth in range(22, 40)),
        correction(charge(3, partition=partition), 100), correction(charge(5, partition=partition), 101, tokens=7),
    ]  # fmt: skip


def messages(partition: int, per_message: int = 4) -> list[Message]:
    """The ledger of a partition; offsets have holes, as those of a real topic may, and one message is no message."""
    everything = entries(partition)
    values = [message(everything[at : at + per_message]) for at in range(0, len(everything), per_message)]
    values.insert(3, b"\xffnobody can read this")
    return [Message(10 + nth * 3, WRITTEN_MS + nth, value) for nth, value in enumerate(values)]


def sealed(
    partition: int, of: Sequence[Message], *, seq: int = 1, link: str = GENESIS, rows_max: int = ROWS_MAX
) -> Iterator[Batch]:
    """The batches of some messages."""
    collector = Collector(TOPIC, partition, 1, seq, {}, rows_max, link=link)
    for each in of:
        if not collector.add(each):
            yield collector.seal()
            collector.add(each)
    yield collector.seal()


def unsealed(partition: int, of: Sequence[Message], rows_max: int = ROWS_MAX) -> Iterator[Batch]:
    """The batches that the first version made of them."""
    for batch in sealed(partition, of, rows_max=rows_max):
        header = BatchHeader.model_validate(batch.header.model_dump() | {"v": 1, "seal": None})
        yield form_again(TOPIC, header, of)
