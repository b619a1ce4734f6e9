"""What is left of a cap, as far as its worker knows: what a guard checks a call against before it starts."""

from typing import Annotated, Literal

from pydantic import Field

from spendfuse.wire.base import Amount, Instant, Name, Scope, WireModel
from spendfuse.wire.budget import Unit


class Remaining(WireModel):
    """What a scope has committed of a cap that halts (`remaining.v1`, key = `scope|budget|cap`, signed).

    It is old when it arrives: `as_of_ms` says which usage it knows, so that a guard adds its own later calls to it.
    """

    v: Literal[1] = Field(default=1, description="version of this message")
    scope: Scope = Field(description="whose money")
    budget: Name = Field(description="budget")
    cap: Name = Field(description="cap of the budget")
    unit: Unit = Field(description="tokens, or nano-units of a currency")
    amount: Amount = Field(description="the cap, in unit")
    spend: Amount = Field(description="charged so far in the running window, in unit")
    committed: Amount = Field(description="spend, and the holds of calls in flight where the budget counts them")
    at: Instant = Field(description="when this was known, by the worker's clock; a later one replaces an earlier one")
    as_of_ms: Annotated[int, Field(ge=-1)] = Field(
        default=-1, description="Kafka timestamp of the newest usage in it, in ms since the epoch; -1 when unknown"
    )
    resets_at: Instant | None = Field(
        default=None, description="end of the window, from when all of the cap is left but for calls in flight"
    )
    withdrawn: bool = Field(default=False, description="the cap is no longer in force")

    @property
    def key(self) -> str:
        """Return the Kafka key."""
        return f"{self.scope}|{self.budget}|{self.cap}"

    @property
    def left(self) -> int:
        """Return what is left, in unit; 0 beyond the cap."""
        return max(0, self.amount - self.committed)
