"""The control plane: commands out to guards, and what comes back."""

from typing import Annotated, Literal

from pydantic import Field

from spendfuse.wire.base import (
    Amount,
    Id,
    Instant,
    Line,
    ModelName,
    Name,
    Offset,
    Partition,
    Scope,
    Sequence,
    WireModel,
)
from spendfuse.wire.budget import Unit, WindowKind

Action = Literal["warn", "degrade", "halt", "resume"]
AlertKind = Literal["warn", "degrade", "halt", "resume", "shadow", "unknown_model", "violation", "lag"]
MANUAL_BUDGET = "manual"
MANUAL_CAP = "halt"
"""A person's halt has this budget and cap, so no cap's resume can lift it."""


class CommandWindow(WireModel):
    """The window that a command is about; `rolling` has no calendar start."""

    kind: WindowKind
    label: Annotated[str, Field(max_length=32)]
    timezone: Annotated[str, Field(max_length=64)]
    start: Instant | None = None
    end: Instant | None = None


class Measure(WireModel):
    """The numbers that caused a command, all in `unit`; `fraction` is in 1/10,000 of the cap."""

    unit: Unit
    cap: Amount
    spend: Amount
    committed: Amount
    fraction: Annotated[int, Field(ge=0)]


class Cause(WireModel):
    """The usage that crossed the line, and where it lies in `usage.v1`."""

    usage_id: Id
    ts: Instant
    partition: Partition
    offset: Offset
    produced_at_ms: Annotated[int, Field(ge=-1)] = -1


class Degrade(WireModel):
    """What to use instead while degraded."""

    models: dict[str, ModelName] = Field(default_factory=dict)
    max_output_tokens: int | None = None


class Command(WireModel):
    """An order to every guard under a scope (`commands.v1`, key = `scope|budget|cap`).

    It carries the numbers that caused it: the sentence a person reads and the audit row are one record.
    """

    v: Literal[1] = 1
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    seq: Sequence
    action: Action
    scope: Scope
    budget: Name
    cap: Name
    budget_version: Annotated[int, Field(ge=0)] = 0
    issued_at: Instant
    expires_at: Instant | None = None
    window: CommandWindow | None = None
    measure: Measure | None = None
    cause: Cause | None = None
    degrade: Degrade | None = None
    price_book: Annotated[str, Field(max_length=96)] = ""
    by: Line = "spendfuse"
    reason: Line = ""
    message: Line = ""

    @property
    def key(self) -> str:
        """Return the Kafka key."""
        return f"{self.scope}|{self.budget}|{self.cap}"


class Alert(WireModel):
    """Something a person should know (`alerts.v1`, key = scope)."""

    v: Literal[1] = 1
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    ts: Instant
    kind: AlertKind
    severity: Literal["info", "warning", "critical"]
    scope: Scope
    budget: Name | None = None
    cap: Name | None = None
    measure: Measure | None = None
    usage_id: Id | None = None
    message: Line


class Heartbeat(WireModel):
    """A sign of life of one worker (`heartbeats.v1`, key = emitter)."""

    v: Literal[1] = 1
    emitter: Id
    ts: Instant
    ready: bool
    version: Annotated[str, Field(max_length=32)]
    price_book: Annotated[str, Field(max_length=96)] = ""
    budgets: Annotated[int, Field(ge=0)] = 0
    lag: Annotated[int, Field(ge=0)] = 0
    stale: bool = False


class Ack(WireModel):
    """A guard's proof that a command arrived and was obeyed (`acks.v1`, key = scope).

    `halt_lag_us` runs from the event time of the crossing usage to `at`, by the guard's clock.
    """

    v: Literal[1] = 1
    command_id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    seq: Sequence
    scope: Scope
    budget: Name
    cap: Name
    agent: Scope
    run: Id | None = None
    guard: Id
    state: Literal["received", "enforced"]
    at: Instant
    halt_lag_us: int | None = None
