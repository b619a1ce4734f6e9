"""From ledger entries to rows: typed, column by column, and nothing that a column cannot hold."""

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple

from pydantic_core import to_json

from spendfuse.wire.base import to_us
from spendfuse.wire.control import Ack, Alert, Command, Measure
from spendfuse.wire.correction import Correction
from spendfuse.wire.ledger import LedgerEntry
from spendfuse.wire.scopes import scope_kind, scope_workspace
from spendfuse.wire.usage import Usage

UNREADABLE_BYTES_MAX: Final = 49_152
"""Most bytes kept of what nobody could read; a multiple of 3, so that base64 needs no padding."""
REASON_CHARS_MAX: Final = 1_000
INSTANT_US_MIN: Final = 0
INSTANT_US_MAX: Final = 4_260_211_200_000_000
"""2105-01-01: a ClickHouse DateTime, the type of the rollups' buckets, ends in February 2106."""
INT64_MAX: Final = 2**63 - 1

Row = dict[str, Any]


class UnfitError(ValueError):
    """An entry that is well-formed and still does not fit its table; the message says which value."""


class Place(NamedTuple):
    """Where a ledger message lies, and when the broker took it (milliseconds since the epoch)."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of one insert, by column."""

    name: str
    columns: Mapping[str, Sequence[Any]]

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return len(next(iter(self.columns.values()), ()))


def entry_row(entry: LedgerEntry, place: Place) -> tuple[str, Row]:
    """Return the table and the row of an entry; raises UnfitError."""
    name, make = _TABLES.get(entry.kind, ("ledger_events", _event))
    row = make(entry)
    row["recorded_at"] = _us("at", entry.at)
    row.update(_source(entry.topic, entry.partition, entry.offset, entry.index, place))
    return name, row


def unreadable_row(raw: bytes, reason: str, place: Place, index: int = 0) -> tuple[str, Row]:
    """Return the row that keeps what could not be read: the reason, and the first bytes in base64."""
    data = {
        "reason": reason[:REASON_CHARS_MAX],
        "bytes_total": len(raw),
        "bytes_base64": base64.b64encode(raw[:UNREADABLE_BYTES_MAX]).decode(),
    }
    at = min(max(place.timestamp_ms * 1_000, INSTANT_US_MIN), INSTANT_US_MAX)
    row: Row = {"kind": "unreadable", "data": _json(data), "recorded_at": at}
    row.update(_source(place.topic, place.partition, place.offset, min(index, 0xFFFF), place))
    return "ledger_events", row


def tables(rows: Iterable[tuple[str, Row]]) -> tuple[Table, ...]:
    """Return rows as columns, one `Table` for each table, ordered by its name."""
    grouped: dict[str, list[Row]] = {}
    for name, row in rows:
        grouped.setdefault(name, []).append(row)
    return tuple(
        Table(name, {column: [row[column] for row in group] for column in group[0]})
        for name, group in sorted(grouped.items())
    )


def _source(topic: str, partition: int, offset: int, index: int, place: Place) -> Row:
    return {
        "src_topic": topic,
        "src_partition": partition,
        "src_offset": offset,
        "src_index": index,
        "ledger_partition": place.partition,
        "ledger_offset": place.offset,
    }


def _usage(entry: LedgerEntry) -> Row:
    usage, charge = entry.usage, entry.charge
    if usage is None:
        raise UnfitError(f"an entry of kind {entry.kind} without usage")
    if charge is None and entry.kind == "charge":
        raise UnfitError("an entry of kind charge without charge")
    return {
        "usage_id": usage.id,
        "occurred_at": _us("usage.ts", usage.ts),
        "kind": entry.kind,
        "usage_kind": usage.kind,
        **_call(usage),
        "cost_nanos": charge.cost_nanos if charge else 0,
        "currency": charge.currency if charge else "",
        "price_book": charge.price_book if charge else "",
        "priced_by": charge.priced_by if charge else "",
        "tier_known": int(charge.tier_known) if charge else 1,
        "rates": [_int64("charge.rates", rate) for rate in charge.rates] if charge else [],
        "late": int(entry.late),
        "source": usage.source,
    }


def _call(of: Usage | Correction) -> Row:
    """Return what a usage and a correction of it both say of the call: whose, of which model, and the tokens."""
    tokens = of.tokens
    return {
        "workspace": of.workspace,
        "team": of.team,
        "agent": of.agent,
        "run": of.run,
        "root_run": of.root_run or of.run,
        "parent_run": of.parent_run or "",
        "workflow": of.workflow or "",
        "provider": of.provider,
        "model": of.model,
        "tier": of.tier,
        "tags": of.tags,
        "input_tokens": tokens.input,
        "cache_read_tokens": tokens.cache_read,
        "cache_write_5m_tokens": tokens.cache_write_5m,
        "cache_write_1h_tokens": tokens.cache_write_1h,
        "output_tokens": tokens.output,
        "reasoning_tokens": tokens.reasoning,
    }


def _correction(entry: LedgerEntry) -> Row:
    correction = entry.correction
    if correction is None:
        raise UnfitError("an entry of kind correction without correction")
    return {
        "correction_id": correction.id,
        "usage_id": correction.usage_id,
        "occurred_at": _us("correction.ts", correction.ts),
        "stated_at": _us("correction.at", correction.at),
        **_call(correction),
        "cost_nanos": correction.cost_nanos,
        "currency": correction.currency,
        "reason": correction.reason,
        "note": correction.note,
        "stated_by": correction.by,
        "late": int(entry.late),
    }


def _command(entry: LedgerEntry) -> Row:
    command = entry.command
    if command is None:
        raise UnfitError(f"an entry of kind {entry.kind} without command")
    window, cause, degrade = command.window, command.cause, command.degrade
    row = {
        "command_id": command.id,
        "decided_only": int(entry.kind == "decision"),
        "seq": command.seq,
        "action": command.action,
        **_scope(command),
        "budget_version": _int64("command.budget_version", command.budget_version),
        "issued_at": _us("command.issued_at", command.issued_at),
        "expires_at": _us_or_none("command.expires_at", command.expires_at),
        "window_kind": window.kind if window else "",
        "window_label": window.label if window else "",
        "window_timezone": window.timezone if window else "",
        "window_start": _us_or_none("command.window.start", window.start) if window else None,
        "window_end": _us_or_none("command.window.end", window.end) if window else None,
        **_measure(command.measure),
        "cause_usage_id": cause.usage_id if cause else "",
        "cause_ts": _us("command.cause.ts", cause.ts) if cause else None,
        "cause_partition": cause.partition if cause else 0,
        "cause_offset": cause.offset if cause else 0,
        "cause_produced_at_ms": _int64("command.cause.produced_at_ms", cause.produced_at_ms) if cause else -1,
        "degrade_models": degrade.models if degrade else {},
        "degrade_max_output_tokens": None,
        "price_book": command.price_book,
        "issued_by": command.by,
        "reason": command.reason,
        "message": command.message,
    }
    if degrade is not None and degrade.max_output_tokens is not None:
        row["degrade_max_output_tokens"] = _int64("command.degrade.max_output_tokens", degrade.max_output_tokens)
    return row


def _ack(entry: LedgerEntry) -> Row:
    ack = entry.ack
    if ack is None:
        raise UnfitError("an entry of kind ack without ack")
    return {
        "command_id": ack.command_id,
        "seq": ack.seq,
        **_scope(ack),
        "agent": ack.agent,
        "run": ack.run or "",
        "guard": ack.guard,
        "state": ack.state,
        "at": _us("ack.at", ack.at),
        "halt_lag_us": None if ack.halt_lag_us is None else _int64("ack.halt_lag_us", ack.halt_lag_us),
    }


def _alert(entry: LedgerEntry) -> Row:
    alert = entry.alert
    if alert is None:
        raise UnfitError("an entry of kind alert without alert")
    return {
        "alert_id": alert.id,
        "ts": _us("alert.ts", alert.ts),
        "kind": alert.kind,
        "severity": alert.severity,
        **_scope(alert),
        **_measure(alert.measure),
        "usage_id": alert.usage_id or "",
        "message": alert.message,
    }


def _event(entry: LedgerEntry) -> Row:
    return {"kind": entry.kind, "data": _json(entry.data or {})}


_TABLES: Final[dict[str, tuple[str, Callable[[LedgerEntry], Row]]]] = {
    "charge": ("usage_events", _usage),
    "duplicate": ("usage_events", _usage),
    "correction": ("corrections", _correction),
    "command": ("commands", _command),
    "decision": ("commands", _command),
    "ack": ("acks", _ack),
    "alert": ("alerts", _alert),
}


def _scope(message: Command | Ack | Alert) -> Row:
    return {
        "scope": message.scope,
        "scope_kind": scope_kind(message.scope),
        "workspace": scope_workspace(message.scope),
        "budget": message.budget or "",
        "cap": message.cap or "",
    }


def _measure(measure: Measure | None) -> Row:
    return {
        "unit": measure.unit if measure else "",
        "cap_amount": measure.cap if measure else 0,
        "spend": measure.spend if measure else 0,
        "committed": measure.committed if measure else 0,
        "fraction_bp": _int64("measure.fraction", measure.fraction) if measure else 0,
    }


def _us(name: str, value: datetime) -> int:
    us = to_us(value)
    if not INSTANT_US_MIN <= us <= INSTANT_US_MAX:
        raise UnfitError(f"{name} {value.isoformat()} is not between 1970 and 2105")
    return us


def _us_or_none(name: str, value: datetime | None) -> int | None:
    return None if value is None else _us(name, value)


def _int64(name: str, value: int) -> int:
    if not -INT64_MAX <= value <= INT64_MAX:
        raise UnfitError(f"{name} is beyond 64 bits")
    return value


def _json(data: dict[str, Any]) -> str:
    return to_json(data).decode()
