"""A correction: what an operator says a charged usage should have been, as signed differences."""

from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from spendfuse.wire.base import NANOS_MAX, TOKENS_MAX, Id, Instant, Line, ModelName, Name, Offset, Partition, WireModel
from spendfuse.wire.packed import INDEX_BITS, PACKED_MAX, Origin
from spendfuse.wire.usage import Provider, Tags, Tier

Difference = Annotated[int, Field(ge=-TOKENS_MAX, le=TOKENS_MAX)]
MoneyDifference = Annotated[int, Field(ge=-NANOS_MAX, le=NANOS_MAX)]
Why = Literal["provider_final", "invoice", "manual"]
CORRECTION_TYPE: Final = "correction"


class TokenDifferences(WireModel):
    """What is to be added to each counter of a usage, in tokens; below zero takes away."""

    input: Difference = Field(default=0, description="to be added to input, in tokens")
    cache_read: Difference = Field(default=0, description="to be added to cache_read, in tokens")
    cache_write_5m: Difference = Field(default=0, description="to be added to cache_write_5m, in tokens")
    cache_write_1h: Difference = Field(default=0, description="to be added to cache_write_1h, in tokens")
    output: Difference = Field(default=0, description="to be added to output, in tokens")
    reasoning: Difference = Field(default=0, description="to be added to reasoning, in tokens; informational")

    @property
    def total(self) -> int:
        """Return the difference of all tokens (reasoning is already in output)."""
        return self.input + self.cache_read + self.cache_write_5m + self.cache_write_1h + self.output


class Correction(WireModel):
    """A charged usage set right (`usage.v1`, key = workspace/team/agent), signed over topic, key and value.

    It states differences and no final numbers: ids are remembered within a horizon only, so nobody but the trail knows
    what was charged. FOCUS calls the row it makes `ChargeClass = Correction`. Names are those of the usage.
    """

    v: Literal[1] = Field(default=1, description="version of this message")
    type: Literal["correction"] = Field(description="what the message is")
    id: Id = Field(description="id of the correction, the same on every delivery; applied once")
    usage_id: Id = Field(description="id of the usage that is corrected")
    ts: Instant = Field(description="event time of that usage; decides the window")
    at: Instant = Field(description="when the correction was stated")
    workspace: Name = Field(description="workspace of the usage")
    team: Name = Field(description="its team")
    agent: Name = Field(description="its agent")
    run: Id = Field(description="its run")
    root_run: Id | None = Field(default=None, description="the root of its tree of runs; the run itself when absent")
    parent_run: Id | None = Field(default=None, description="the run that started its run")
    workflow: Name | None = Field(default=None, description="its workflow, for reports")
    provider: Provider = Field(description="its provider")
    model: ModelName = Field(description="its model")
    tier: Tier = Field(default="standard", description="its service tier")
    tags: Tags = Field(default_factory=dict, description="its tags, for reports")
    tokens: TokenDifferences = Field(default_factory=TokenDifferences, description="differences of its counters")
    cost_nanos: MoneyDifference = Field(default=0, description="difference of its cost, in nano-units of currency")
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = Field(description="ISO 4217 code; that of its charge")
    reason: Why = Field(
        description="provider_final: the provider's final numbers; invoice: reconciliation; manual: a person's"
    )
    note: Line = Field(default="", description="why, in one line, such as the invoice's number")
    by: Name = Field(description="the operator who states it; a name, not an e-mail address")

    @model_validator(mode="after")
    def _corrects_something(self) -> Self:
        if self.cost_nanos == 0 and not any(self.tokens.model_dump().values()):
            raise ValueError("all differences are zero: a correction corrects something")
        return self

    @property
    def agent_path(self) -> str:
        """Return `workspace/team/agent`, the Kafka key of a correction."""
        return f"{self.workspace}/{self.team}/{self.agent}"


class PackedCorrection(WireModel):
    """A correction, and where it came from: partition, offset, index in the message, Kafka timestamp (ms)."""

    p: Partition = Field(description="partition in usage.v1")
    o: Offset = Field(description="offset in that partition")
    i: Annotated[int, Field(ge=0, lt=1 << INDEX_BITS)] = Field(default=0, description="place in the record, always 0")
    t: Annotated[int, Field(ge=-1)] = Field(
        default=-1, description="Kafka timestamp in ms since the epoch; -1 when unknown"
    )
    c: Correction = Field(description="the correction")

    @property
    def origin(self) -> Origin:
        """Return the origin."""
        return Origin(self.p, self.o, self.i)


class PackedCorrections(WireModel):
    """One message of `usage.packed.v1` that holds corrections, in the order of their origin offsets.

    A message holds usages or corrections, never both: so both stay in the order of their offsets.
    """

    v: Literal[1] = Field(default=1, description="version of this message")
    corrections: Annotated[list[PackedCorrection], Field(min_length=1, max_length=PACKED_MAX)] = Field(
        description="corrections in the order of their origin offsets"
    )
