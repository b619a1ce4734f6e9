"""The price book, compiled to integers: usage in, charge out, nothing rounded but once.

A rate is nano-units per million tokens, so tokens x rate is femto-units (10^-15), exact. One half-even rounding
to nano-units is made for each usage (design.md section 3).
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Final, Literal, NamedTuple

from spendfuse.engine.call import Used
from spendfuse.wire.base import to_us
from spendfuse.wire.prices import PriceBookFile, PriceOverride, PriceRow, Rates
from spendfuse.wire.usage import Usage

FEMTO_PER_NANO: Final = 1_000_000
LOOKUP_CACHE_MAX: Final = 10_000
STANDARD: Final = "standard"

RateTuple = tuple[int, int, int, int, int]
"""Nano-units per million tokens: input, cache_read, cache_write_5m, cache_write_1h, output."""
PricedBy = Literal["book", "override", "ceiling"]


class Charge(NamedTuple):
    """A usage priced, with all that is needed to compute it again."""

    cost_nanos: int
    currency: str
    price_book: str
    priced_by: PricedBy
    rates: RateTuple
    tier_known: bool


class _Row(NamedTuple):
    from_us: int
    to_us: int
    rates: RateTuple
    above_tokens: int
    above: RateTuple
    priced_by: PricedBy


class _Found(NamedTuple):
    row: _Row
    tier_known: bool


_Tiers = dict[str, list[_Row]]


class _Names:
    """Rows by provider, by name and by tier; a name is exact, or a prefix."""

    def __init__(self, rows: Iterable[PriceRow], priced_by: PricedBy) -> None:
        self._exact: dict[tuple[str, str], _Tiers] = {}
        self._prefixes: dict[str, dict[str, _Tiers]] = {}
        for row in rows:
            compiled = _compile(row, priced_by)
            for name in (row.model, *row.models):
                if name.endswith("*"):
                    tiers = self._prefixes.setdefault(row.provider, {}).setdefault(name[:-1], {})
                else:
                    tiers = self._exact.setdefault((row.provider, name), {})
                tiers.setdefault(row.tier, []).append(compiled)

    def of(self, provider: str, model: str) -> list[_Tiers]:
        """Return what matches a model, the nearest name first: the exact one, then the longest prefix."""
        exact = self._exact.get((provider, model))
        prefixes = self._prefixes.get(provider, {})
        near = sorted((prefix for prefix in prefixes if model.startswith(prefix)), key=len, reverse=True)
        return ([] if exact is None else [exact]) + [prefixes[prefix] for prefix in near]


_ALWAYS_FROM: Final = -(2**62)
_ALWAYS_TO: Final = 2**62


def rate_tuple(rates: Rates) -> RateTuple:
    """Return the rates in the order of the counters."""
    return (rates.input, rates.cache_read, rates.cache_write_5m, rates.cache_write_1h, rates.output)


def round_half_even(femto: int) -> int:
    """Return femto-units as nano-units, halves to even."""
    quotient, rest = divmod(femto, FEMTO_PER_NANO)
    half = FEMTO_PER_NANO // 2
    return quotient + (rest > half or (rest == half and quotient & 1))


def rows_sha256(rows: Iterable[PriceRow]) -> str:
    """Return the content hash of a book's rows: SHA-256 over one compact JSON line for each row, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.model_dump_json(exclude_none=True).encode() + b"\n")
    return digest.hexdigest()


def _compile(row: PriceRow, priced_by: PricedBy) -> _Row:
    rates = rate_tuple(row.rates)
    return _Row(
        _ALWAYS_FROM if row.valid_from is None else to_us(row.valid_from),
        _ALWAYS_TO if row.valid_to is None else to_us(row.valid_to),
        rates,
        row.above.threshold if row.above else _ALWAYS_TO,
        rate_tuple(row.above.rates) if row.above else rates,
        priced_by,
    )


class PriceBook:
    """A compiled price book: immutable; overrides come before the book's own rows."""

    def __init__(
        self, *, version: str, currency: str, rows: Sequence[PriceRow], overrides: Sequence[PriceOverride] = ()
    ) -> None:
        """Compile the rows; use `compile` for a file."""
        self.version = version
        self.currency = currency
        self._overrides = _Names((override.row for override in overrides), "override")
        self._book = _Names(rows, "book")
        self._cache: dict[tuple[str, str, str], tuple[_Found, ...]] = {}
        self._ceilings = _ceilings([*rows, *(override.row for override in overrides)])

    @classmethod
    def compile(cls, file: PriceBookFile, overrides: Sequence[PriceOverride] = ()) -> "PriceBook":
        """Return a file and the overrides now in force, compiled; the version names both by content."""
        version = f"{file.book}+{file.sha256[:12]}"
        if overrides:
            ordered = sorted(overrides, key=lambda override: override.id)
            version += f"+{rows_sha256(override.row for override in ordered)[:12]}"
            overrides = ordered
        return cls(version=version, currency=file.currency, rows=file.rows, overrides=overrides)

    def charge(self, usage: Usage) -> Charge:
        """Return what a usage costs at its own event time; an unknown model costs its provider's ceiling."""
        return self.price(usage, to_us(usage.ts))

    def price(self, used: Used, ts_us: int) -> Charge:
        """Return what was used at an instant costs, as `charge` does."""
        counters = used.tokens
        inputs = counters.input + counters.cache_read + counters.cache_write_5m + counters.cache_write_1h
        rates, priced_by, tier_known = self._rates(used, inputs, ts_us)
        femto = (
            counters.input * rates[0]
            + counters.cache_read * rates[1]
            + counters.cache_write_5m * rates[2]
            + counters.cache_write_1h * rates[3]
            + counters.output * rates[4]
        )
        return Charge(round_half_even(femto), self.currency, self.version, priced_by, rates, tier_known)

    def knows(self, provider: str, model: str) -> bool:
        """Say whether a model has a price of its own."""
        return bool(self._find(provider, model, STANDARD))

    def _rates(self, used: Used, inputs: int, ts_us: int) -> tuple[RateTuple, PricedBy, bool]:
        for row, tier_known in self._find(used.provider, used.model, used.tier):
            if row.from_us <= ts_us < row.to_us:
                return (row.above if inputs > row.above_tokens else row.rates), row.priced_by, tier_known
        ceiling = self._ceilings.get(used.provider) or self._ceilings[""]
        return ceiling, "ceiling", used.tier == STANDARD

    def _find(self, provider: str, model: str, tier: str) -> tuple[_Found, ...]:
        key = (provider, model, tier)
        found = self._cache.get(key)
        if found is None:
            if len(self._cache) >= LOOKUP_CACHE_MAX:
                self._cache.clear()  # names come from outside: a flood of them must not grow the memory
            found = self._cache[key] = self._search(provider, model, tier)
        return found

    def _search(self, provider: str, model: str, tier: str) -> tuple[_Found, ...]:
        # Every override that matches comes before the book; of the book only the nearest name: a price of another
        # model that begins alike would be a guess, and what is unknown costs the ceiling.
        names = [*self._overrides.of(provider, model), *self._book.of(provider, model)[:1]]
        found = [_Found(row, tier_known=True) for tiers in names for row in tiers.get(tier, ())]
        if tier != STANDARD:  # a tier without a price of its own costs the standard price, and is flagged
            found += [_Found(row, tier_known=False) for tiers in names for row in tiers.get(STANDARD, ())]
        return tuple(found)


def _ceilings(rows: Sequence[PriceRow]) -> dict[str, RateTuple]:
    """Return the dearest rate of each counter by provider; `""` is the dearest of all.

    A counter that a provider never charges is not free for a model nobody knows: cached input costs its input,
    and what is left the dearest of all.
    """
    dearest: dict[str, RateTuple] = {"": (0, 0, 0, 0, 0)}
    for row in rows:
        for rates in (row.rates, *((row.above.rates,) if row.above else ())):
            for name in (row.provider, ""):
                known = dearest.get(name, (0, 0, 0, 0, 0))
                a, b, c, d, e = (max(pair) for pair in zip(known, rate_tuple(rates), strict=True))
                dearest[name] = (a, b, c, d, e)
    top = dearest[""]
    return {name: _never_free(rates, top) for name, rates in dearest.items()}


def _never_free(rates: RateTuple, top: RateTuple) -> RateTuple:
    fresh = rates[0] or top[0]
    cached = [rate or rates[0] or highest or fresh for rate, highest in zip(rates[1:4], top[1:4], strict=True)]
    return fresh, cached[0], cached[1], cached[2], rates[4] or top[4] or fresh
