"""The sentence a person reads at 3 a.m.: what happened, with both numbers, and when it ends."""

from typing import Final
from zoneinfo import ZoneInfo

from spendfuse.wire.base import from_us

NANOS_PER_CENT: Final = 10_000_000
NANOS_PER_UNIT: Final = 1_000_000_000


def money(nanos: int, currency: str) -> str:
    """Return nano-units as `USD 1,234.56`, halves up; below a cent, all nine decimals that are needed."""
    if 0 < nanos < NANOS_PER_CENT:
        return f"{currency} 0.{nanos:09d}".rstrip("0")
    cents = (nanos + NANOS_PER_CENT // 2) // NANOS_PER_CENT
    return f"{currency} {cents // 100:,}.{cents % 100:02d}"


def amount(value: int, unit: str) -> str:
    """Return an amount of a cap's unit (`tokens`, `nano-USD`) for a person."""
    return f"{value:,} tokens" if unit == "tokens" else money(value, unit.removeprefix("nano-"))


def instant(us: int, zone: str) -> str:
    """Return an instant in a zone as `2026-11-24 00:00 Europe/Amsterdam`."""
    return f"{from_us(us).astimezone(ZoneInfo(zone)):%Y-%m-%d %H:%M} {zone}"
