"""Prices: the rows of a price book file, and overrides that are followed live."""

from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from spendfuse.wire.base import Id, Instant, Line, ModelName, WireModel
from spendfuse.wire.usage import Provider, Tier

ROWS_MAX: Final = 20_000
Rate = Annotated[int, Field(ge=0, le=10**15, description="nano-units of the currency per 1,000,000 tokens")]


class Rates(WireModel):
    """What a million tokens of each counter cost, in nano-units of the book's currency."""

    input: Rate
    cache_read: Rate
    cache_write_5m: Rate
    cache_write_1h: Rate
    output: Rate


class LongContext(WireModel):
    """Other rates for every token of a call whose whole input is strictly above `threshold` tokens."""

    threshold: Annotated[int, Field(ge=1)]
    rates: Rates


class PriceRow(WireModel):
    """The rates of one model at one provider and tier, from an instant until another (exclusive).

    `models` lists further names: exact ones, and prefixes that end in `*`.
    """

    provider: Provider
    model: ModelName
    tier: Tier = "standard"
    models: Annotated[list[Annotated[str, Field(max_length=128)]], Field(max_length=64)] = Field(
        default_factory=list
    )
    valid_from: Instant | None = None
    valid_to: Instant | None = None
    rates: Rates
    above: LongContext | None = None

    @model_validator(mode="after")
    def _time_runs_forward(self) -> Self:
        if self.valid_from is not None and self.valid_to is not None and self.valid_from >= self.valid_to:
            raise ValueError(f"valid_from {self.valid_from} is not before valid_to {self.valid_to}")
        return self


class PriceBookFile(WireModel):
    """A price book as a file: versioned by `book`, hashed over its rows (`sha256`), dated row by row."""

    v: Literal[1] = 1
    book: Annotated[str, Field(pattern=r"^[0-9a-z.-]{1,32}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    source: Line
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")]
    unit: Literal["nano-units per 1000000 tokens"] = "nano-units per 1000000 tokens"
    rows: Annotated[list[PriceRow], Field(min_length=1, max_length=ROWS_MAX)]


class PriceOverride(WireModel):
    """One row that comes before the book's (`prices.v1`, key = id); a tombstone takes it back."""

    v: Literal[1] = 1
    id: Id
    row: PriceRow
    note: Line = ""
