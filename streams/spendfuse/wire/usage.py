"""Usage v1: the tokens of one model call, single or packed."""

from re import Pattern
from re import compile as compile_pattern
from typing import Annotated, Final, Literal, Self

from pydantic import Field, TypeAdapter, model_validator

from spendfuse.wire.base import Count, Id, Instant, Line, ModelName, Name, TagValue, WireModel

TAGS_MAX: Final = 16
PACK_MAX: Final = 500
"""Most usages in one packed message."""
CONFLUENT_PREFIX_BYTES: Final = 5
"""Magic byte 0x00 and a 4-byte schema id (Confluent wire format)."""

Kind = Literal["finished", "started", "progress"]
PROVIDER_PATTERN: Final = r"^[a-z0-9][a-z0-9._-]{0,63}$"
TIER_PATTERN: Final = r"^[a-z0-9][a-z0-9._-]{0,31}$"
Provider = Annotated[str, Field(pattern=PROVIDER_PATTERN)]
Tier = Annotated[str, Field(pattern=TIER_PATTERN)]
Tags = Annotated[dict[Name, TagValue], Field(max_length=TAGS_MAX)]


class Tokens(WireModel):
    """Disjoint counters of one call, in tokens; `reasoning` is part of `output`, informational.

    `input` is what no cache served: a source that reports input inclusive of cache subtracts first.
    """

    input: Count = Field(
        default=0,
        description="prompt tokens that no cache served or stored; subtract the cache counters from an inclusive total",
    )
    cache_read: Count = Field(default=0, description="prompt tokens served from a cache, in tokens")
    cache_write_5m: Count = Field(
        default=0, description="prompt tokens written to a 5-minute cache (or one of unsaid lifetime), in tokens"
    )
    cache_write_1h: Count = Field(default=0, description="prompt tokens written to a 1-hour cache, in tokens")
    output: Count = Field(default=0, description="generated tokens, reasoning included, in tokens")
    reasoning: Count = Field(
        default=0, description="the part of output that was reasoning, in tokens; informational, never charged twice"
    )

    @property
    def total(self) -> int:
        """Return all tokens of the call (reasoning is already in output)."""
        return self.input + self.cache_read + self.cache_write_5m + self.cache_write_1h + self.output

    @model_validator(mode="after")
    def _reasoning_is_part_of_output(self) -> Self:
        if self.reasoning > self.output:
            raise ValueError(f"reasoning ({self.reasoning}) cannot exceed output ({self.output})")
        return self


class Usage(WireModel):
    """One model call of one agent: `finished` with its tokens, or in flight with an upper bound.

    `started` carries the most the call may use and its `deadline`; `progress` the cumulative tokens so far.
    The three kinds of one call share its `id`. No price, prompt or e-mail address is ever part of it.
    """

    v: Literal[1] = Field(default=1, description="version of this message")
    id: Id = Field(
        description="id of the call, the same on every delivery and for started, progress and finished; charged once"
    )
    ts: Instant = Field(
        description="when the call ended, or this was known; decides the window; RFC 3339 with an offset"
    )
    kind: Kind = Field(
        default="finished",
        description="finished: the tokens used; started: the most it may use; progress: the tokens so far, cumulative",
    )
    workspace: Name = Field(description="workspace that pays; a name, not an e-mail address")
    team: Name = Field(description="team of the workspace")
    agent: Name = Field(description="agent of the team; workspace/team/agent is the Kafka key")
    run: Id = Field(description="id of the run that made the call")
    root_run: Id | None = Field(
        default=None, description="id of the run at the root of the tree of runs; the run itself when absent"
    )
    parent_run: Id | None = Field(default=None, description="id of the run that started this one")
    workflow: Name | None = Field(default=None, description="name of the workflow, for reports")
    provider: Provider = Field(
        description="who served the call: anthropic, openai, google, aws, azure, ...; part of the price key"
    )
    model: ModelName = Field(
        description="model as the provider names it; one that the price book lacks is charged at a ceiling"
    )
    tier: Tier = Field(
        default="standard",
        description="service tier: standard, batch, priority, flex, fast; an unknown one is charged as standard",
    )
    tokens: Tokens = Field(description="disjoint counters of the call")
    deadline: Instant | None = Field(
        default=None, description="started or progress only: until when the call may hold its tokens"
    )
    source: Line = Field(default="", description="what emitted this, such as spendfuse-client/0.1 or otel")
    tags: Tags = Field(
        default_factory=dict, description="free labels for reports, at most 16; no prompts and no e-mail addresses"
    )

    @model_validator(mode="after")
    def _deadline_belongs_to_calls_in_flight(self) -> Self:
        if self.kind == "finished" and self.deadline is not None:
            raise ValueError("deadline is for kind started or progress, not finished")
        return self

    @property
    def agent_path(self) -> str:
        """Return `workspace/team/agent`, the Kafka key of a usage."""
        return f"{self.workspace}/{self.team}/{self.agent}"


class UsagePack(WireModel):
    """Several usages in one Kafka message, of any agents."""

    v: Literal[1] = Field(default=1, description="version of this message")
    usages: Annotated[list[Usage], Field(min_length=1, max_length=PACK_MAX)] = Field(
        description="1 to 500 usages, of any agents"
    )


_SINGLE_OR_PACKED: Final[TypeAdapter[Usage | UsagePack]] = TypeAdapter(Usage | UsagePack)
_SINGLE: Final = TypeAdapter(Usage)
_PACKED: Final = TypeAdapter(UsagePack)
_PACK_HEAD: Final[Pattern[bytes]] = compile_pattern(rb'\s*\{\s*(?:"v"\s*:\s*1\s*,\s*)?"usages"\s*:')
"""How a pack begins when it is written as most are; a usage may say "usages" too, as a tag."""


def strip_confluent_prefix(value: bytes) -> bytes:
    """Return the payload behind a Confluent schema-registry prefix, or the value as it is."""
    return value[CONFLUENT_PREFIX_BYTES:] if value[:1] == b"\x00" else value


def decode_usages(value: bytes) -> list[Usage]:
    """Return the usages of one message of `usage.v1`, single or packed.

    Raises `pydantic.ValidationError` naming each field at fault.
    """
    payload = strip_confluent_prefix(value)
    if _PACK_HEAD.match(payload):
        return _PACKED.validate_json(payload).usages
    if b'"usages"' in payload:  # a pack whose "usages" is not written first, or a usage with that tag
        message = _SINGLE_OR_PACKED.validate_json(payload)
        return message.usages if isinstance(message, UsagePack) else [message]
    return [_SINGLE.validate_json(payload)]
