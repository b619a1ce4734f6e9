"""The ledger: everything that happened, each entry with where it came from."""

from typing import Annotated, Any, Final, Literal

from pydantic import Field

from spendfuse.wire.base import Amount, Instant, Offset, Partition, WireModel
from spendfuse.wire.control import Ack, Alert, Command
from spendfuse.wire.usage import Usage

LEDGER_BATCH_MAX: Final = 2_000
"""Most entries in one message of `ledger.v1`."""

PricedBy = Literal["book", "override", "ceiling"]


class Charge(WireModel):
    """A usage priced: the rates are nano-units per million tokens of each counter, in their order."""

    cost_nanos: Amount
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")]
    price_book: Annotated[str, Field(max_length=96)]
    priced_by: PricedBy
    rates: Annotated[list[int], Field(min_length=5, max_length=5)]
    tier_known: bool = True


class LedgerEntry(WireModel):
    """One fact of the audit trail, with the record of a topic it came from.

    `charge` and `duplicate` carry `usage` and `charge`; `command`, `ack` and `alert` their message;
    `decision` a command that was decided and not sent (shadow); `budget`, `price` and `rejected` plain data.
    """

    kind: Literal[
        "charge",
        "duplicate",
        "command",
        "decision",
        "ack",
        "alert",
        "budget",
        "price",
        "rejected",
        "operator",
    ]
    topic: Annotated[str, Field(max_length=249)]
    partition: Partition
    offset: Offset
    index: Annotated[int, Field(ge=0, lt=1 << 16)] = 0
    at: Instant
    late: bool = False
    usage: Usage | None = None
    charge: Charge | None = None
    command: Command | None = None
    ack: Ack | None = None
    alert: Alert | None = None
    data: dict[str, Any] | None = None


class LedgerBatch(WireModel):
    """One message of `ledger.v1`: the entries of one round, in order."""

    v: Literal[1] = 1
    entries: Annotated[list[LedgerEntry], Field(min_length=1, max_length=LEDGER_BATCH_MAX)]
