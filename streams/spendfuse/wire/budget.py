"""Budgets: an allocation for a scope or a pattern, as a list of caps."""

from typing import Annotated, Final, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, Field, model_validator

from spendfuse.wire.base import Amount, Instant, Line, ModelName, Name, WireModel

CAPS_MAX: Final = 16
RESERVED_BUDGET: Final = "manual"
"""The budget of a person's halt: no budget of this name, so that no cap's resume can lift it."""
UNKNOWN_MODEL_CAP: Final = "unknown-model"
"""The cap of the halt for a model without a price: no cap of this name, for the same reason."""
WARNS_MAX: Final = 8
GRACE_S_MAX: Final = 7 * 86_400
BASIS_POINTS: Final = 10_000
"""Fractions of a cap are integers of 1/10,000."""

ScopePattern = Annotated[
    str,
    Field(
        max_length=320,
        pattern=r"^(workspace:[^/\s:\[\]]+|team:[^/\s\[\]]+/[^/\s\[\]]+|agent:[^/\s\[\]]+/[^/\s\[\]]+/[^/\s\[\]]+|run:[^/\s\[\]]+/[^\s\[\]]+)$",
        description="a scope, or a pattern with * and ? inside a segment: one fuse for each match",
    ),
]
WindowKind = Literal["run", "hour", "day", "week", "month", "rolling"]
ROLLING_S_MIN: Final = 300
ROLLING_S_MAX: Final = 86_400
Fraction = Annotated[int, Field(ge=1, le=BASIS_POINTS, description="1/10,000 of the cap")]
Unit = Annotated[str, Field(pattern=r"^(tokens|nano-[A-Z]{3})$", description="tokens, or nano-units of a currency")]


def _known_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"unknown time zone {name!r}: use an IANA name such as Europe/Amsterdam") from error
    return name


TimeZone = Annotated[str, Field(max_length=64), AfterValidator(_known_zone)]


class WindowSpec(WireModel):
    """Over what time a cap counts: a run's whole life, a calendar unit, or the last `rolling_s` seconds."""

    kind: WindowKind = Field(
        description="run: its whole life; hour to month: in the budget's time zone; rolling: the last rolling_s seconds"
    )
    rolling_s: Annotated[int, Field(ge=ROLLING_S_MIN, le=ROLLING_S_MAX, multiple_of=60)] | None = Field(
        default=None,
        description="length of a rolling window in seconds: 300 to 86,400, whole minutes; only with kind rolling",
    )

    @model_validator(mode="after")
    def _rolling_has_a_length(self) -> Self:
        if (self.kind == "rolling") != (self.rolling_s is not None):
            raise ValueError("rolling_s goes with kind rolling, and only with it")
        return self

    @property
    def label(self) -> str:
        """Return the window as a person writes it: `day`, `rolling 90m`."""
        if self.rolling_s is None:
            return self.kind
        hours, rest = divmod(self.rolling_s, 3_600)
        return f"rolling {hours}h" if not rest else f"rolling {self.rolling_s // 60}m"


class DegradeRule(WireModel):
    """What an agent should do with less: other models, shorter answers."""

    at: Fraction = Field(description="from which fraction of the cap, in 1/10,000")
    models: Annotated[dict[Annotated[str, Field(max_length=128)], ModelName], Field(max_length=64)] = Field(
        default_factory=dict, description="model in use -> model to use instead"
    )
    max_output_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        default=None, description="longest answer to ask for, in tokens"
    )


class Cap(WireModel):
    """An amount of one unit in one window, and what happens at which fraction of it."""

    id: Name = Field(description="name of the cap within its budget")
    unit: Unit = Field(description="tokens, or nano-units of a currency such as nano-USD")
    amount: Annotated[Amount, Field(gt=0)] = Field(description="the cap, in unit")
    window: WindowSpec = Field(description="over what time it counts")
    warn: Annotated[list[Fraction], Field(max_length=WARNS_MAX)] = Field(
        default_factory=list, description="fractions of the cap at which to warn, in 1/10,000"
    )
    degrade: DegradeRule | None = Field(default=None, description="from when agents should do with less")
    halt: bool = Field(default=True, description="whether agents are stopped at the cap")


class Budget(WireModel):
    """An allocation for a scope, or one for each scope a pattern matches (`budgets.v1`, key = id)."""

    v: Literal[1] = Field(default=1, description="version of this message")
    type: Literal["budget"] = Field(default="budget", description="what the message is")
    id: Name = Field(description="id of the budget, the Kafka key; a null value removes it")
    version: Annotated[int, Field(ge=1)] = Field(description="grows with each change of content")
    scope: ScopePattern = Field(
        description="whose money: a scope, or a pattern with * and ? inside a segment, one fuse for each match"
    )
    timezone: TimeZone = Field(default="UTC", description="IANA time zone of the windows")
    caps: Annotated[list[Cap], Field(min_length=1, max_length=CAPS_MAX)] = Field(description="1 to 16 caps")
    unknown_model: Literal["ceiling", "deny", "warn"] = Field(
        default="ceiling",
        description="a model without a price: charge the ceiling, deny (halt), or charge the ceiling and warn",
    )
    shadow: bool = Field(default=False, description="decide and record, and command nothing")
    count_holds: bool = Field(default=True, description="whether calls in flight count against the caps")
    grace_s: Annotated[int, Field(ge=0, le=GRACE_S_MAX)] = Field(
        default=3_600, description="how late a usage may still change its window, in seconds"
    )
    note: Line = Field(default="", description="why, in one line")
    applied_at: Instant | None = Field(default=None, description="when it was applied")

    @model_validator(mode="after")
    def _caps_have_ids_of_their_own(self) -> Self:
        ids = [cap.id for cap in self.caps]
        twice = sorted({name for name in ids if ids.count(name) > 1})
        if twice:
            raise ValueError(f"cap ids must differ within a budget; used twice: {', '.join(twice)}")
        return self

    @model_validator(mode="after")
    def _reserved_names_are_free(self) -> Self:
        if self.id == RESERVED_BUDGET:
            raise ValueError(f"budget id {self.id!r} is kept for a person's halts: use another id")
        if any(cap.id == UNKNOWN_MODEL_CAP for cap in self.caps):
            raise ValueError(f"cap id {UNKNOWN_MODEL_CAP!r} is kept for unknown_model: deny; use another id")
        return self

    @model_validator(mode="after")
    def _run_windows_are_for_runs(self) -> Self:
        wrong = [cap.id for cap in self.caps if cap.window.kind == "run" and not self.scope.startswith("run:")]
        if wrong:
            raise ValueError(f"window run needs a scope run:...; caps {', '.join(wrong)} are on {self.scope}")
        return self


class WorkspaceSettings(WireModel):
    """A workspace's own time zone, in which hour, day and month are always kept (`budgets.v1`)."""

    v: Literal[1] = Field(default=1, description="version of this message")
    type: Literal["workspace"] = Field(default="workspace", description="what the message is")
    workspace: Name = Field(description="the workspace; the Kafka key is workspace/<name>")
    timezone: TimeZone = Field(default="UTC", description="IANA time zone in which hour, day and month are always kept")
