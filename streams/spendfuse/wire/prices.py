"""Prices: the rows of a price book file, and overrides that are followed live."""

from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from spendfuse.wire.base import Id, Instant, Line, ModelName, WireModel
from spendfuse.wire.usage import Provider, Tier

ROWS_MAX: Final = 20_000
Rate = Annotated[int, Field(ge=0, le=10**15, description="nano-units of the currency per 1,000,000 tokens")]


class Rates(WireModel):
    """What a million tokens of each counter cost, in nano-units of the book's currency."""

    input: Rate = Field(description="nano-units per 1,000,000 tokens of input")
    cache_read: Rate = Field(description="nano-units per 1,000,000 tokens of cache_read")
    cache_write_5m: Rate = Field(description="nano-units per 1,000,000 tokens of cache_write_5m")
    cache_write_1h: Rate = Field(description="nano-units per 1,000,000 tokens of cache_write_1h")
    output: Rate = Field(description="nano-units per 1,000,000 tokens of output")


class LongContext(WireModel):
    """Other rates for every token of a call whose whole input is strictly above `threshold` tokens."""

    threshold: Annotated[int, Field(ge=1)] = Field(
        description="tokens of input, cache reads and cache writes together; strictly above it all tokens move"
    )
    rates: Rates = Field(description="the rates above the threshold")


class PriceRow(WireModel):
    """The rates of one model at one provider and tier, from an instant until another (exclusive).

    `models` lists further names: exact ones, and prefixes that end in `*`.
    """

    provider: Provider = Field(description="provider of the model")
    model: ModelName = Field(description="the model's own name at that provider")
    tier: Tier = Field(default="standard", description="service tier of these rates")
    models: Annotated[list[Annotated[str, Field(max_length=128)]], Field(max_length=64)] = Field(
        default_factory=list, description="further names of the model: exact, or a prefix that ends in *"
    )
    valid_from: Instant | None = Field(default=None, description="first instant of these rates; always when absent")
    valid_to: Instant | None = Field(default=None, description="first instant after them; still valid when absent")
    rates: Rates = Field(description="nano-units per 1,000,000 tokens")
    above: LongContext | None = Field(default=None, description="other rates for long contexts")

    @model_validator(mode="after")
    def _time_runs_forward(self) -> Self:
        if self.valid_from is not None and self.valid_to is not None and self.valid_from >= self.valid_to:
            raise ValueError(f"valid_from {self.valid_from} is not before valid_to {self.valid_to}")
        return self


class PriceBookFile(WireModel):
    """A price book as a file: versioned by `book`, hashed over its rows (`sha256`), dated row by row."""

    v: Literal[1] = Field(default=1, description="version of this message")
    book: Annotated[str, Field(pattern=r"^[0-9a-z.-]{1,32}$")] = Field(
        description="version of the book, such as 2026-11-23"
    )
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] = Field(
        description="SHA-256 over one compact JSON line for each row, in order, unset fields left out"
    )
    source: Line = Field(description="where the prices are from")
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = Field(description="ISO 4217 code of all rates")
    unit: Literal["nano-units per 1000000 tokens"] = Field(
        default="nano-units per 1000000 tokens", description="unit of all rates"
    )
    rows: Annotated[list[PriceRow], Field(min_length=1, max_length=ROWS_MAX)] = Field(
        description="the rates, by provider, model, tier and time"
    )


class PriceOverride(WireModel):
    """One row that comes before the book's (`prices.v1`, key = id); a tombstone takes it back."""

    v: Literal[1] = Field(default=1, description="version of this message")
    id: Id = Field(description="id of the override, the Kafka key; a null value takes it back")
    row: PriceRow = Field(description="the row that comes before the book's")
    note: Line = Field(default="", description="why, in one line")
