"""Ledger entries for the audit's tests, and the sums a reader expects of them, added up without the audit's code."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from spendfuse.wire.base import encode
from spendfuse.wire.control import Ack, Cause, Command, CommandWindow, Measure
from spendfuse.wire.correction import Correction, TokenDifferences
from spendfuse.wire.ledger import Charge, LedgerBatch, LedgerEntry
from spendfuse.wire.usage import Tokens, Usage

if TYPE_CHECKING:
    from collections.abc import Iterable

START = datetime(2025, 3, 28, 22, 0, tzinfo=UTC)
"""A Friday evening before a month's end: the weekend of it lies in one month, the Tuesday in the next."""
COUNTERS = ("input", "cache_read", "cache_write_5m", "cache_write_1h", "output", "reasoning")


def charge(nth: int, *, kind: str = "charge", partition: int = 0, **usage: Any) -> LedgerEntry:
    """The nth usage of an origin partition, every value of it following from nth."""
    given: dict[str, Any] = {
        "id": f"call-{partition}-{nth}",
        "ts": START + timedelta(seconds=nth * 37, microseconds=nth),
        "workspace": "acme",
        "team": "research" if nth % 3 else "support",
        "agent": f"agent-{nth % 5}",
        "run": f"run-{nth % 7}",
        "root_run": "run-root",
        "parent_run": None if nth % 2 else "run-root",
        "workflow": "weekly-report",
        "provider": "anthropic",
        "model": "claude-opus-4-5" if nth % 2 else "claude-haiku-4-5",
        "tokens": Tokens(
            input=nth * 11 + 1, cache_read=nth * 101, cache_write_5m=nth % 13, cache_write_1h=nth % 3, output=nth + 9,
            reasoning=nth % 9,
        ),
        "source": "test",
        "tags": {"cost-center": f"cc-{nth % 2}", "note": "o'brien \\ \"x\" ; DROP TABLE usage_events --"},
    }  # fmt: skip
    return LedgerEntry(
        kind=kind,  # type: ignore[arg-type]
        topic="spendfuse.usage.v1",
        partition=partition,
        offset=nth // 4,
        index=nth % 4,
        at=START + timedelta(days=1, seconds=nth),
        late=nth % 10 == 0,
        usage=Usage(**{**given, **usage}),
        charge=Charge(
            cost_nanos=nth * 1_000_003 + 7, currency="USD", price_book="test-1", priced_by="book",
            rates=[5_000_000_000, 500_000_000, 6_250_000_000, 10_000_000_000, 25_000_000_000],
        ),
    )  # fmt: skip


def correction(of: LedgerEntry, offset: int, *, tokens: int = -5, **given: Any) -> LedgerEntry:
    """A correction of a charge: `tokens` more output and one nano-unit more for each, an hour after it was recorded."""
    usage, priced = of.usage, of.charge
    assert usage is not None
    assert priced is not None
    same = (
        "workspace",
        "team",
        "agent",
        "run",
        "root_run",
        "parent_run",
        "workflow",
        "provider",
        "model",
        "tier",
        "tags",
    )
    values = {name: getattr(usage, name) for name in same} | {
        "type": "correction", "id": f"fix-{usage.id}", "usage_id": usage.id, "ts": usage.ts,
        "at": of.at + timedelta(hours=1), "tokens": TokenDifferences(output=tokens), "cost_nanos": tokens,
        "currency": priced.currency, "reason": "invoice", "note": "INV-7", "by": "ada",
    }  # fmt: skip
    return LedgerEntry(
        kind="correction", topic="spendfuse.usage.v1", partition=of.partition, offset=offset,
        at=of.at + timedelta(hours=1), correction=Correction(**(values | given)),
    )  # fmt: skip


def command_entry(command: Command, offset: int, kind: str = "command", index: int = 0) -> LedgerEntry:
    """A command as the ledger has it."""
    return LedgerEntry(
        kind=kind,  # type: ignore[arg-type]
        topic="spendfuse.commands.v1", partition=0, offset=offset, index=index, at=command.issued_at, command=command,
    )  # fmt: skip


def halt(nth: int, scope: str = "agent:acme/research/agent-1", **given: Any) -> Command:
    """A halt of a day's cap of one dollar, crossed at 1.10 dollars by a usage a minute before it was issued."""
    values: dict[str, Any] = {
        "id": f"{nth:032x}",
        "seq": nth,
        "action": "halt",
        "scope": scope,
        "budget": "weekend",
        "cap": "daily",
        "budget_version": 1,
        "issued_at": START + timedelta(minutes=10),
        "window": CommandWindow(
            kind="day",
            label="day",
            timezone="UTC",
            start=START.replace(hour=0),
            end=START.replace(hour=0) + timedelta(1),
        ),
        "measure": Measure(
            unit="nano-USD", cap=1_000_000_000, spend=1_100_000_000, committed=1_100_000_000, fraction=11_000
        ),
        "cause": Cause(usage_id="call-0-1", ts=START + timedelta(minutes=9), partition=0, offset=0),
        "message": "it's over",
    }
    return Command(**{**values, **given})


def ack_entry(command: Command, offset: int, state: str, at: datetime, **given: Any) -> LedgerEntry:
    """A guard's word about a command."""
    values: dict[str, Any] = {
        "command_id": command.id, "seq": command.seq, "scope": command.scope, "budget": command.budget,
        "cap": command.cap, "agent": "agent:acme/research/agent-1", "run": "run-1", "guard": "guard-1",
        "state": state, "at": at,
    }  # fmt: skip
    return LedgerEntry(
        kind="ack", topic="spendfuse.acks.v1", partition=0, offset=offset, at=at, ack=Ack(**{**values, **given})
    )


def message(entries: Iterable[LedgerEntry]) -> bytes:
    """The bytes of one ledger message."""
    return encode(LedgerBatch(entries=list(entries)))


def totals(entries: Iterable[LedgerEntry]) -> dict[tuple[str, str], tuple[int, ...]]:
    """(team, agent) -> calls, the six counters and nano-units of the charges; each origin counts once."""
    sums: defaultdict[tuple[str, str], list[int]] = defaultdict(lambda: [0] * 8)
    seen = set()
    for entry in entries:
        origin = (entry.partition, entry.offset, entry.index)
        if entry.kind != "charge" or origin in seen:
            continue
        seen.add(origin)
        assert entry.usage is not None
        assert entry.charge is not None
        values = [1, *(getattr(entry.usage.tokens, name) for name in COUNTERS), entry.charge.cost_nanos]
        into = sums[entry.usage.team, entry.usage.agent]
        for place, value in enumerate(values):
            into[place] += value
    return {key: tuple(value) for key, value in sums.items()}
