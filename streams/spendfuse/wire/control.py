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
from spendfuse.wire.budget import RESERVED_BUDGET, Unit, WindowKind

Action = Literal["warn", "degrade", "halt", "resume"]
AlertKind = Literal[
    "warn", "degrade", "halt", "resume", "shadow", "unknown_model", "violation", "forged", "lag", "correction"
]
"""`violation`: spending went on after a halt; `forged`: a record among the commands that nobody with a key wrote;
`correction`: one took more from a window than was charged in it."""
MANUAL_BUDGET = RESERVED_BUDGET
MANUAL_CAP = "halt"
"""A person's halt has this budget and cap, so no cap's resume can lift it."""


class CommandWindow(WireModel):
    """The window that a command is about; `rolling` has no calendar start."""

    kind: WindowKind = Field(description="kind of the window")
    label: Annotated[str, Field(max_length=32)] = Field(
        description="the window as a person writes it: day, rolling 90m"
    )
    timezone: Annotated[str, Field(max_length=64)] = Field(description="IANA time zone of the window")
    start: Instant | None = Field(default=None, description="first instant of the window")
    end: Instant | None = Field(default=None, description="first instant after it")


class Measure(WireModel):
    """The numbers that caused a command, all in `unit`; `fraction` is in 1/10,000 of the cap."""

    unit: Unit = Field(description="tokens, or nano-units of a currency")
    cap: Amount = Field(description="the cap, in unit")
    spend: Amount = Field(description="charged so far, in unit")
    committed: Amount = Field(description="spend and the holds of calls in flight, in unit")
    fraction: Annotated[int, Field(ge=0)] = Field(description="committed in 1/10,000 of the cap")


class Cause(WireModel):
    """The usage that crossed the line, or the correction that changed a sum, and where it lies in `usage.v1`."""

    usage_id: Id = Field(description="id of the usage that crossed the line, or that was corrected")
    ts: Instant = Field(description="its event time; of a correction, when it was stated")
    partition: Partition = Field(description="its partition in usage.v1")
    offset: Offset = Field(description="its offset there")
    produced_at_ms: Annotated[int, Field(ge=-1)] = Field(
        default=-1, description="its Kafka timestamp in ms since the epoch; -1 when unknown"
    )


class Degrade(WireModel):
    """What to use instead while degraded."""

    models: dict[str, ModelName] = Field(default_factory=dict, description="model in use -> model to use instead")
    max_output_tokens: int | None = Field(default=None, description="longest answer to ask for, in tokens")


class Command(WireModel):
    """An order to every guard under a scope (`commands.v1`, key = `scope|budget|cap`).

    It carries the numbers that caused it: the sentence a person reads and the audit row are one record.
    """

    v: Literal[1] = Field(default=1, description="version of this message")
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] = Field(
        description="deterministic id: the same decision has the same id"
    )
    seq: Sequence = Field(description="grows for each scope, budget and cap; a guard ignores one that is not greater")
    action: Action = Field(description="what to do")
    scope: Scope = Field(description="whom it is for: everything below it obeys")
    budget: Name = Field(description="budget that decided; manual for a person's halt")
    cap: Name = Field(description="cap that decided; halt for a person's halt")
    budget_version: Annotated[int, Field(ge=0)] = Field(
        default=0, description="version of the budget that decided; 0 for a person's"
    )
    issued_at: Instant = Field(description="when it was decided")
    expires_at: Instant | None = Field(
        default=None, description="from when it no longer holds, such as the window's end; none: until a resume"
    )
    window: CommandWindow | None = Field(default=None, description="the window it is about")
    measure: Measure | None = Field(default=None, description="the numbers that caused it")
    cause: Cause | None = Field(default=None, description="the usage that caused it")
    degrade: Degrade | None = Field(default=None, description="what to use instead, with action degrade")
    price_book: Annotated[str, Field(max_length=96)] = Field(default="", description="price book in use, name and hash")
    by: Line = Field(default="spendfuse", description="who decided: spendfuse, or an operator")
    reason: Line = Field(default="", description="an operator's reason")
    message: Line = Field(default="", description="the sentence for a person")

    @property
    def key(self) -> str:
        """Return the Kafka key."""
        return f"{self.scope}|{self.budget}|{self.cap}"


class Alert(WireModel):
    """Something a person should know (`alerts.v1`, key = scope)."""

    v: Literal[1] = Field(default=1, description="version of this message")
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] = Field(description="id of the alert")
    ts: Instant = Field(description="when")
    kind: AlertKind = Field(description="what it is about")
    severity: Literal["info", "warning", "critical"] = Field(description="how urgent")
    scope: Scope = Field(description="whose money")
    budget: Name | None = Field(default=None, description="budget concerned")
    cap: Name | None = Field(default=None, description="cap concerned")
    measure: Measure | None = Field(default=None, description="the numbers")
    usage_id: Id | None = Field(default=None, description="usage concerned")
    message: Line = Field(description="the sentence for a person")


class Heartbeat(WireModel):
    """A sign of life of one worker (`heartbeats.v1`, key = emitter)."""

    v: Literal[1] = Field(default=1, description="version of this message")
    emitter: Id = Field(description="the worker")
    ts: Instant = Field(description="when")
    ready: bool = Field(description="whether it decides on current state")
    version: Annotated[str, Field(max_length=32)] = Field(description="version of spendfuse")
    price_book: Annotated[str, Field(max_length=96)] = Field(default="", description="price book in use, name and hash")
    budgets: Annotated[int, Field(ge=0)] = Field(default=0, description="number of budgets it knows")
    lag: Annotated[int, Field(ge=0)] = Field(default=0, description="usage messages not yet read")
    stale: bool = Field(default=False, description="whether its decisions may be old")


class Ack(WireModel):
    """A guard's proof that a command arrived and was obeyed (`acks.v1`, key = scope).

    `halt_lag_us` runs from the event time of the crossing usage to `at`, by the guard's clock.
    """

    v: Literal[1] = Field(default=1, description="version of this message")
    command_id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] = Field(description="id of the command")
    seq: Sequence = Field(description="seq of the command")
    scope: Scope = Field(description="scope of the command")
    budget: Name = Field(description="budget of the command")
    cap: Name = Field(description="cap of the command")
    agent: Scope = Field(description="agent that obeyed")
    run: Id | None = Field(default=None, description="run that obeyed")
    guard: Id = Field(description="id of the guard")
    state: Literal["received", "enforced"] = Field(
        description="received: read and verified; enforced: a call was refused"
    )
    at: Instant = Field(description="when, by the guard's clock")
    halt_lag_us: int | None = Field(
        default=None, description="from the event time of the crossing usage to at, in microseconds"
    )
    calls_in_flight: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="enforced: calls that had begun under this guard and not yet ended"
    )
    tokens_since: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="enforced: tokens of the calls that ended under this guard after the halt had arrived"
    )
