"""Small builders of messages, with what a test does not care about filled in."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from spendfuse.engine.ids import SeenIds
from spendfuse.engine.meter import PartitionMeter
from spendfuse.engine.orders import CausedBy, Effects
from spendfuse.engine.policies import Policies
from spendfuse.engine.prices import PriceBook
from spendfuse.pipeline import quick
from spendfuse.wire.base import encode, from_us, to_us
from spendfuse.wire.budget import Budget, Cap, DegradeRule, WindowSpec
from spendfuse.wire.packed import Packed, PackedUsage
from spendfuse.wire.prices import PriceRow, Rates
from spendfuse.wire.usage import Tokens, Usage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spendfuse.engine.call import Call
    from spendfuse.engine.state import ScopeState

SECOND = 1_000_000
MINUTE = 60 * SECOND
HOUR = 3_600 * SECOND
DAY = 24 * HOUR
NOW = to_us(datetime(2026, 11, 23, 10, 0, tzinfo=UTC))
"""A Monday morning, in microseconds."""
MILLION = 1_000_000
AGENT = "agent:acme/research/planner"


def at(text: str) -> int:
    """Return RFC 3339 text as microseconds since the epoch."""
    return to_us(datetime.fromisoformat(text))


def usage(nth: int = 0, *, ts_us: int = NOW, output: int = 1, **more: Any) -> Usage:
    """Return a usage of `agent:acme/research/planner` with `output` tokens, each 1 nano-USD in `book()`."""
    values: dict[str, Any] = {
        "id": f"call-{nth}",
        "ts": from_us(ts_us),
        "workspace": "acme",
        "team": "research",
        "agent": "planner",
        "run": "run-1",
        "provider": "openai",
        "model": "known",
        "tokens": Tokens(output=output),
    }
    return Usage(**(values | more))


def packed(message: Usage, offset: int, *, partition: int = 0, nth: int = 0, t: int = -1) -> PackedUsage:
    """Return a usage with its origin."""
    return PackedUsage(p=partition, o=offset, i=nth, t=t, u=message)


def call(message: Usage, offset: int, *, partition: int = 0, nth: int = 0, t: int = -1) -> Call:
    """Return a usage as the meter takes it."""
    return calls([packed(message, offset, partition=partition, nth=nth, t=t)])[0]


def calls(messages: Sequence[PackedUsage]) -> list[Call]:
    """Return packed usages as the meter takes them, by the way they take in production."""
    if not messages:
        return []
    found = quick.calls(encode(Packed(usages=list(messages))))
    assert found is not None, "what the models write is what the quick way reads"
    return found


def rates(each: int = MILLION, **more: int) -> Rates:
    """Return rates; 1,000,000 nano-units for a million tokens is one nano-unit a token."""
    names = ("input", "cache_read", "cache_write_5m", "cache_write_1h", "output")
    return Rates(**(dict.fromkeys(names, each) | more))


def row(model: str = "known", provider: str = "openai", each: int = MILLION, **more: Any) -> PriceRow:
    """Return a row of a price book."""
    return PriceRow(provider=provider, model=model, rates=more.pop("rates", rates(each)), **more)


def book(*rows: PriceRow, **more: Any) -> PriceBook:
    """Return a price book in which the model `known` costs one nano-USD a token."""
    return PriceBook(**({"version": "test+1", "currency": "USD", "rows": rows or (row(),)} | more))


def cap(amount: int = 100, window: str = "day", **more: Any) -> Cap:
    """Return a cap; `window` is a kind, or `rolling 5m`."""
    kind, _, length = window.partition(" ")
    spec = WindowSpec(kind=kind, rolling_s=int(length[:-1]) * 60 if length else None)  # type: ignore[arg-type]
    if isinstance(more.get("degrade"), int):
        more["degrade"] = DegradeRule(at=more["degrade"], models={"known": "cheap"}, max_output_tokens=500)
    return Cap(**({"id": "c", "unit": "nano-USD", "amount": amount, "window": spec} | more))


def budget(*caps: Cap, scope: str = "agent:acme/research/planner", **more: Any) -> Budget:
    """Return a budget for the agent of `usage()`."""
    return Budget(**({"id": "b", "version": 1, "scope": scope, "caps": list(caps) or [cap()]} | more))


def cause(nth: int = 0, ts_us: int = NOW) -> CausedBy:
    """Return the place of a usage."""
    return CausedBy(f"call-{nth}", ts_us, 0, nth)


def meter(partition: int = 0, stored: dict[str, ScopeState] | None = None) -> PartitionMeter:
    """Return a partition's meter over stored states, or over none."""
    return PartitionMeter(partition, (stored or {}).get, SeenIds())


class Line:
    """One partition's meter under some budgets, fed one usage at a time."""

    def __init__(self, *budgets: Budget, **more: Any) -> None:
        self.policies = Policies(budgets)
        self.book = more.pop("prices", book())
        self.meter = meter()
        self.offset = 0

    def spend(self, output: int = 1, now_us: int = NOW, ts_us: int | None = None, **more: Any) -> Effects:
        self.offset += 1
        message = usage(self.offset, ts_us=now_us if ts_us is None else ts_us, output=output, **more)
        return self.meter.apply([call(message, self.offset)], self.policies, self.book, now_us).effects

    def change(self, *budgets: Budget, now_us: int = NOW, prices: Any = None) -> Effects:
        self.policies, self.book = Policies(budgets), prices or self.book
        return self.meter.reconsider(AGENT, self.policies, self.book, now_us) or Effects()


def told(effects: Effects) -> list[str]:
    """Return the actions commanded, and what was alerted beside them."""
    commanded = [command.action for command in effects.commands]
    return commanded + [f"alert {alert.kind}" for alert in effects.alerts if alert.kind not in commanded]
