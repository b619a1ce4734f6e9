"""Build the price book that ships, from the data of genai-prices: integers, dated, hashed.

    python schemas/build_price_book.py            writes schemas/pricebook/2026-11-23.json
    python schemas/build_price_book.py --check    writes nothing; ends with 1 when the file is not what would be written

A book is immutable: a new genai-prices is a new book with a new date, never a change of an old one. What is left out,
and why, is printed: a model without a row here is charged at its provider's ceiling, never at zero.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, date, datetime, time
from decimal import Decimal
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

from genai_prices.data import providers as PROVIDERS  # noqa: N812 - a constant of that library, named as one
from genai_prices.types import (
    ClauseContains,
    ClauseEndsWith,
    ClauseEquals,
    ClauseOr,
    ClauseRegex,
    ClauseStartsWith,
    ConditionalPrice,
    ModelInfo,
    ModelPrice,
    Provider,
    StartDateConstraint,
    TieredPrices,
    TimeOfDateConstraint,
)

HERE: Final = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "streams"))

from spendfuse.engine.prices import rows_sha256  # noqa: E402 - the source root is put on the path first
from spendfuse.wire.base import MODEL_PATTERN  # noqa: E402 - the same
from spendfuse.wire.prices import LongContext, PriceBookFile, PriceRow, Rates  # noqa: E402 - the same

BOOK: Final = "2026-11-23"
SOURCE_VERSION: Final = "0.2.3"
TARGET: Final = HERE / "pricebook" / f"{BOOK}.json"
FILE_BYTES_MAX: Final = 1_500_000
NAMES_MAX: Final = 64
NAME: Final = re.compile(MODEL_PATTERN.removeprefix("^").removesuffix("$") + r"\*?")
NANOS: Final = 10**9

PROVIDER_IDS: Final = ("anthropic", "openai", "google", "mistral", "x-ai", "deepseek", "groq", "aws", "azure")
TIERS: Final[dict[str, tuple[dict[str, str], ...]]] = {
    # Tiers of usage v1, and the request contexts of genai-prices that mean them, in order of preference.
    "standard": ({},),
    "batch": ({"processing": "batch"},),
    "priority": ({"service_tier": "priority"},),
    "flex": ({"service_tier": "flex"},),
    "fast": ({"speed": "fast"}, {"service_tier": "fast"}),
}
INPUT, OUTPUT = "input_mtok", "output_mtok"
CACHE_READ, CACHE_WRITE, CACHE_WRITE_1H = "cache_read_mtok", "cache_write_mtok", "cache_write_1h_mtok"
TEXT_KEYS: Final = (INPUT, OUTPUT, CACHE_READ, CACHE_WRITE, CACHE_WRITE_1H)
BEDROCK_GEOGRAPHIES: Final = ("global", "us", "us-gov", "eu", "apac", "au", "ca", "jp", "in")
"""Prefixes of Bedrock's inference profiles, as in `us.anthropic.claude-...`."""

Price = Decimal | TieredPrices | None


class Name(NamedTuple):
    """A name of a model in the book, and strings that must all find that very model in genai-prices."""

    text: str
    probes: tuple[str, ...]


class LeftOutError(Exception):
    """A model, or a name of it, that the book cannot say: the reason."""


class Report:
    """What was left out, by reason."""

    def __init__(self) -> None:
        """Start empty."""
        self.left_out: dict[str, list[str]] = {}
        self.dearest_hour: list[str] = []

    def add(self, reason: str, what: str) -> None:
        """Note one thing that was left out."""
        self.left_out.setdefault(reason, []).append(what)

    def print(self, rows: list[PriceRow], size: int) -> None:
        """Print the report."""
        by_provider = Counter(row.provider for row in rows)
        by_tier = Counter(row.tier for row in rows)
        models = len({(row.provider, row.model) for row in rows})
        print(f"{models} models in {len(rows)} rows, {size:,} bytes")
        print("  rows by provider:", ", ".join(f"{name} {count}" for name, count in by_provider.items()))
        print("  rows by tier:", ", ".join(f"{name} {count}" for name, count in by_tier.items()))
        print("  priced at the dearest hour of the day:", ", ".join(self.dearest_hour) or "none")
        for reason, what in sorted(self.left_out.items()):
            print(f"  left out, {reason}: {len(what)}\n    {', '.join(what)}")


def nanos(price: Decimal, where: str) -> int:
    """Return USD per million tokens as nano-USD per million tokens; raises for a fraction of a nano."""
    scaled = price * NANOS
    if scaled != int(scaled):
        raise ValueError(f"{where}: {price} USD per million tokens is not a whole number of nano-USD")
    return int(scaled)


# Names ----------------------------------------------------------------------------------------------------------------


def candidate_names(provider_id: str, clause: Any) -> Iterator[Name]:
    """Yield exact names and prefixes (`...*`) that a match clause surely holds for; raises `LeftOutError` for others.

    `contains X` holds for every name that starts with X, and `ends with X` for X itself: a part of the clause, not all.
    """
    if isinstance(clause, ClauseEquals):
        yield Name(clause.equals, (clause.equals,))
    elif isinstance(clause, ClauseStartsWith):
        yield _prefix(clause.starts_with)
    elif isinstance(clause, ClauseEndsWith):
        yield Name(clause.ends_with, (clause.ends_with,))
    elif isinstance(clause, ClauseContains):
        yield _prefix(clause.contains)
        if provider_id == "aws" and clause.contains.partition(".")[0] not in (*BEDROCK_GEOGRAPHIES, "regional"):
            vendors = ("anthropic.",) if clause.contains.startswith("claude") else ("",)
            yield from (
                _prefix(f"{geography}{vendor}{clause.contains}")
                for vendor in vendors
                for geography in ("", *(f"{name}." for name in BEDROCK_GEOGRAPHIES))
            )
    elif isinstance(clause, ClauseRegex):
        yield from _dated_names(clause.regex)
    else:
        raise LeftOutError(f"{type(clause).__name__} cannot be said as names")


def _prefix(text: str) -> Name:
    return Name(f"{text}*", (text, f"{text}-x"))


def _dated_names(regex: str) -> Iterator[Name]:
    """Yield `claude-sonnet-5-20*` for `^claude-sonnet-5-\\d{8}$`: dates of this century."""  # noqa: D301 - shown as written
    dated = re.fullmatch(r"\^(?P<stem>[A-Za-z0-9\\./-]+?)(?P<joint>-|\[-@\])\\d\{(?P<first>[48])\}.*\$", regex)
    if dated is None:
        raise LeftOutError(f"pattern {regex} cannot be said as names")
    stem = re.sub(r"\\(.)", r"\1", dated["stem"])
    probe = "260101" if dated["first"] == "8" else "26-01-01"
    for joint in ("-", "@") if dated["joint"] == "[-@]" else ("-",):
        yield Name(f"{stem}{joint}20*", (f"{stem}{joint}20{probe}",))


def names_of(provider: Provider, model: ModelInfo, report: Report) -> list[str]:
    """Return the names by which a provider's agents may call a model, the first of them its own; empty if none."""
    clauses = model.match.or_ if isinstance(model.match, ClauseOr) else [model.match]
    candidates: dict[str, Name] = {}
    for clause in clauses:
        try:
            candidates.update({name.text: name for name in candidate_names(provider.id, clause)})
        except LeftOutError as reason:
            report.add("a name", f"{provider.id}/{model.id} ({reason})")
    names: list[str] = []
    for name in candidates.values():
        if not NAME.fullmatch(name.text):
            report.add("a name that no usage can carry", f"{provider.id}/{name.text}")
        elif all(provider.find_model(probe, all_providers=PROVIDERS) is model for probe in name.probes):
            names.append(name.text)
        else:
            report.add("a name that another model takes first", f"{provider.id}/{name.text}")
    own = provider.find_model(model.id, all_providers=PROVIDERS)
    if own is model or (own is None and model in provider.models):
        return [model.id, *(name for name in names if name != model.id)][: NAMES_MAX + 1]
    exact = next((name for name in names if not name.endswith("*")), None)
    return [] if exact is None else [exact, *(name for name in names if name != exact)][: NAMES_MAX + 1]


# Rates ----------------------------------------------------------------------------------------------------------------


def base(price: Price) -> Decimal | None:
    """Return the price below any threshold."""
    return price.base if isinstance(price, TieredPrices) else price


def beyond(price: Price) -> Decimal | None:
    """Return the price above the one threshold."""
    return price.tiers[0].price if isinstance(price, TieredPrices) else price


def rates(prices: Mapping[str, Decimal | None], where: str) -> Rates:
    """Return the five rates in nano-USD; what has no price of its own costs what the tokens it is part of cost."""
    given = {key: nanos(price, where) for key, price in prices.items() if price is not None}
    cache_write = given.get(CACHE_WRITE, given[INPUT])
    return Rates(
        input=given[INPUT],
        cache_read=given.get(CACHE_READ, given[INPUT]),
        cache_write_5m=cache_write,
        cache_write_1h=given.get(CACHE_WRITE_1H, cache_write),
        output=given.get(OUTPUT, 0),
    )


Priced = tuple[Rates, LongContext | None]


def priced(price: ModelPrice, model_id: str) -> Priced:
    """Return the rates, and those above a threshold; raises `LeftOutError` for what five counters cannot say."""
    present = {key: value for key, value in price.__dict__.items() if value is not None}
    text: dict[str, Price] = {key: present.get(key) for key in TEXT_KEYS}
    if not present:
        raise LeftOutError("no price at all")
    if text[INPUT] is None:
        raise LeftOutError("not priced by input tokens")
    if text[OUTPUT] is None and ("embed" not in model_id or any(key.startswith("output_") for key in present)):
        raise LeftOutError("no price of output text")
    if "requests_kcount" in present:
        raise LeftOutError("a price by request")
    thresholds = {tier.start for value in text.values() if isinstance(value, TieredPrices) for tier in value.tiers}
    if len(thresholds) > 1:
        raise LeftOutError("several thresholds")
    below = rates({key: base(value) for key, value in text.items()}, model_id)
    above = rates({key: beyond(value) for key, value in text.items()}, model_id)
    if not thresholds or above == below:
        return below, None
    return below, LongContext(threshold=thresholds.pop(), rates=above)


def dearest(options: list[Priced]) -> Priced:
    """Return the highest rate of each counter: what a price by the hour of the day costs at most."""
    if any(above is not None for _, above in options):
        raise LeftOutError("a price by the hour of the day with thresholds")
    return Rates(**{name: max(getattr(below, name) for below, _ in options) for name in Rates.model_fields}), None


def conditions(model: ModelInfo) -> list[ConditionalPrice]:
    """Return a model's dated prices, the oldest first."""
    return model.prices if isinstance(model.prices, list) else [ConditionalPrice(prices=model.prices)]


def by_the_hour(model: ModelInfo) -> bool:
    """Say whether the price depends on the hour of the day."""
    return any(isinstance(one.constraint, TimeOfDateConstraint) for one in conditions(model))


def starts(model: ModelInfo) -> list[date]:
    """Return the days on which anything about a model's price changes."""
    constraints = [one.constraint for one in (*conditions(model), *(model.price_variants or ()))]
    return sorted({one.start_date for one in constraints if isinstance(one, StartDateConstraint)})


def price_at(model: ModelInfo, moment: datetime, contexts: tuple[dict[str, str], ...]) -> Priced:
    """Return the rates at an instant in the first of the contexts that changes them."""
    if by_the_hour(model):
        # `moment` is midnight; the dated price is what holds when no interval of the day does.
        dated = [one for one in conditions(model) if not isinstance(one.constraint, TimeOfDateConstraint)]
        daily = [one for one in conditions(model) if isinstance(one.constraint, TimeOfDateConstraint)]
        plain = ModelInfo(id=model.id, match=model.match, prices=dated)
        return dearest([priced(one, model.id) for one in (plain.get_prices(moment), *(each.prices for each in daily))])
    standard = priced(model.get_prices(moment), model.id)
    for context in contexts:
        other = priced(model.get_prices(moment, context), model.id)
        if other != standard:
            return other
    return standard


def history(model: ModelInfo, contexts: tuple[dict[str, str], ...]) -> list[tuple[datetime | None, Priced]]:
    """Return from when which rates hold, the first from always; equal neighbours are one."""
    days = starts(model)
    first = datetime.combine(date(2000, 1, 1), time(), UTC)
    moments = [first, *(datetime.combine(day, time(), UTC) for day in days)]
    found: list[tuple[datetime | None, Priced]] = []
    for moment in moments:
        now = price_at(model, moment, contexts)
        if not found or found[-1][1] != now:
            found.append((None if moment is first else moment, now))
    return found


def rows_of(provider: Provider, model: ModelInfo, names: list[str], *, own: bool) -> Iterator[PriceRow]:
    """Yield a model's rows: standard, and every other tier whose price differs at any time."""
    standard = history(model, ({},))
    for tier, contexts in TIERS.items():
        if tier != "standard" and not own:
            continue  # genai-prices knows no tiers of a model that it borrows from another provider
        dated = history(model, contexts)
        if tier != "standard" and dated == standard:
            continue
        for (since, (below, above)), (until, _) in pairwise([*dated, (None, dated[-1][1])]):
            yield PriceRow(
                provider=provider.id,
                model=names[0],
                tier=tier,
                models=names[1:],
                valid_from=since,
                valid_to=until,
                rates=below,
                above=above,
            )


# Book -----------------------------------------------------------------------------------------------------------------


def models_of(provider: Provider) -> Iterable[tuple[ModelInfo, bool]]:
    """Yield the provider's models, then those it sells at another provider's price; the flag says whose."""
    yield from ((model, True) for model in provider.models)
    lenders = {other.id: other for other in PROVIDERS}
    for lender in provider.fallback_model_providers or ():
        if lender in PROVIDER_IDS:
            yield from ((model, False) for model in lenders[lender].models)


def build() -> tuple[PriceBookFile, Report]:
    """Return the book and what was left out of it."""
    installed = version("genai-prices")
    if installed != SOURCE_VERSION:
        raise SystemExit(f"the book {BOOK} is built from genai-prices {SOURCE_VERSION}; installed is {installed}")
    report = Report()
    rows: list[PriceRow] = []
    by_id = {provider.id: provider for provider in PROVIDERS}
    for provider_id in PROVIDER_IDS:
        provider = by_id[provider_id]
        for model, own in models_of(provider):
            try:
                history(model, ({},))
                names = names_of(provider, model, report if own else Report())
                if not names:
                    if own:
                        report.add("no name of its own", f"{provider_id}/{model.id}")
                    continue
                rows.extend(rows_of(provider, model, names, own=own))
            except LeftOutError as reason:
                if own:
                    report.add(str(reason), f"{provider_id}/{model.id}")
                continue
            if by_the_hour(model):
                report.dearest_hour.append(f"{provider_id}/{model.id}")
    book = PriceBookFile(
        book=BOOK,
        sha256=rows_sha256(rows),
        source=f"genai-prices {SOURCE_VERSION} (MIT)",
        currency="USD",
        rows=rows,
    )
    return book, report


def text_of(book: PriceBookFile) -> str:
    """Return the file: a header, then one line for each row, so that a diff shows the rows that differ."""
    header = book.model_copy(update={"rows": []}).model_dump_json(exclude_none=True)
    lines = ",\n".join(row.model_dump_json(exclude_none=True) for row in book.rows)
    return header.removesuffix("]}") + "\n" + lines + "\n]}\n"


def main() -> int:
    """Write the book, or check it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 when the file differs")
    check = parser.parse_args().check
    book, report = build()
    text = text_of(book)
    if len(text.encode()) > FILE_BYTES_MAX:
        raise SystemExit(f"the book has {len(text.encode()):,} bytes, more than {FILE_BYTES_MAX:,}")
    if check:
        current = TARGET.read_text(encoding="utf-8") if TARGET.exists() else ""
        if current != text:
            print(f"{TARGET.name} is not what genai-prices {SOURCE_VERSION} gives: run schemas/build_price_book.py")
        return int(current != text)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(text, encoding="utf-8")
    report.print(book.rows, len(text.encode()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
