"""Ledger entries as JSON: a charge without the objects between, and everything else through its model."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from spendfuse.engine.meter import Charged
from spendfuse.engine.prices import PricedBy, RateTuple
from spendfuse.wire.base import encode, from_us, rfc3339
from spendfuse.wire.ledger import Charge as WireCharge
from spendfuse.wire.ledger import LedgerEntry
from spendfuse.wire.topics import USAGE

RATES_MAX: Final = 10_000
"""Most combinations of rates whose text is remembered."""


def charged_texts(charged: Iterable[Charged]) -> list[bytes]:
    """Return charges as `wire.base.encode` would make of their entries, byte for byte.

    Every value of them was validated where it came from, or computed from such.
    """
    texts = []
    at_us, at = -1, ""
    for kind, call, charge, late, recorded_us in charged:
        if recorded_us != at_us:
            at_us, at = recorded_us, rfc3339(from_us(recorded_us))
        head = (
            f'{{"kind":"{kind}","topic":"{USAGE.name}","partition":{call.partition},"offset":{call.offset},'
            f'"index":{call.nth},"at":"{at}","late":{"true" if late else "false"},"usage":'
        )
        tail = f',"charge":{{"cost_nanos":{charge.cost_nanos},{_rest(*charge[1:])}}}'
        texts.append(b"%b%b%b}" % (head.encode(), call.body, tail.encode()))
    return texts


@lru_cache(maxsize=RATES_MAX)
def _rest(currency: str, price_book: str, priced_by: PricedBy, rates: RateTuple, tier_known: bool) -> str:
    """Return all of a charge but its cost, which alone differs from one call of a model to the next."""
    charge = WireCharge(
        cost_nanos=0, currency=currency, price_book=price_book, priced_by=priced_by, rates=list(rates),
        tier_known=tier_known,
    )  # fmt: skip
    return encode(charge).decode().removeprefix('{"cost_nanos":0,').removesuffix("}")


def entry_texts(entries: Iterable[LedgerEntry]) -> list[bytes]:
    """Return entries as JSON."""
    return [encode(entry) for entry in entries]
