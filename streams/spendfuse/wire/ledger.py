"""The ledger: everything that happened, each entry with where it came from."""

from typing import Annotated, Any, Final, Literal

from pydantic import Field

from spendfuse.wire.base import Amount, Instant, Offset, Partition, WireModel
from spendfuse.wire.control import Ack, Alert, Command
from spendfuse.wire.correction import Correction
from spendfuse.wire.usage import Usage

LEDGER_BATCH_MAX: Final = 2_000
"""Most entries in one message of `ledger.v1`."""

PricedBy = Literal["book", "override", "ceiling"]


class Charge(WireModel):
    """A usage priced: the rates are nano-units per million tokens of each counter, in their order."""

    cost_nanos: Amount = Field(description="cost in nano-units of currency")
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = Field(description="ISO 4217 code")
    price_book: Annotated[str, Field(max_length=96)] = Field(description="price book used, name and hash")
    priced_by: PricedBy = Field(description="the book's row, an override, or the ceiling of an unknown model")
    rates: Annotated[list[int], Field(min_length=5, max_length=5)] = Field(
        description="nano-units per 1,000,000 tokens of input, cache_read, cache_write_5m, cache_write_1h, output"
    )
    tier_known: bool = Field(default=True, description="false when the tier had no row and standard was charged")


class LedgerEntry(WireModel):
    """One fact of the audit trail, with the record of a topic it came from.

    `charge` and `duplicate` carry `usage` and `charge`; `correction` what is added to an earlier charge; `command`,
    `ack` and `alert` their message; `decision` a command that was decided and not sent (shadow); `budget`, `price` and
    `rejected` plain data; `proof` what a guard signed, beside the ack of the same origin that it proves;
    `claim` what an ack that nothing proves says of calls in flight and tokens since.
    """

    kind: Literal[
        "charge",
        "duplicate",
        "correction",
        "command",
        "decision",
        "ack",
        "alert",
        "budget",
        "price",
        "rejected",
        "proof",
        "claim",
        "operator",
    ] = Field(description="what happened")
    topic: Annotated[str, Field(max_length=249)] = Field(description="topic of the record it came from")
    partition: Partition = Field(description="its partition")
    offset: Offset = Field(description="its offset")
    index: Annotated[int, Field(ge=0, lt=1 << 16)] = Field(default=0, description="place within that record, from 0")
    at: Instant = Field(description="when it was recorded")
    late: bool = Field(
        default=False, description="usage that came after its window's grace: charged, and changing no window"
    )
    usage: Usage | None = Field(default=None, description="the usage, of charge and duplicate")
    charge: Charge | None = Field(default=None, description="its charge")
    correction: Correction | None = Field(default=None, description="of correction")
    command: Command | None = Field(default=None, description="of command and decision")
    ack: Ack | None = Field(default=None, description="of ack")
    alert: Alert | None = Field(default=None, description="of alert")
    data: dict[str, Any] | None = Field(default=None, description="of the other kinds")


class LedgerBatch(WireModel):
    """One message of `ledger.v1`: the entries of one round, in order."""

    v: Literal[1] = Field(default=1, description="version of this message")
    entries: Annotated[list[LedgerEntry], Field(min_length=1, max_length=LEDGER_BATCH_MAX)] = Field(
        description="the entries of one round, in order"
    )
