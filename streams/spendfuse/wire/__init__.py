"""What crosses a process: the messages, their topics, and how their bytes are checked and signed.

Imports pydantic and the standard library only, so that any emitter or guard can carry it.
"""

from spendfuse.wire.base import WireModel, encode
from spendfuse.wire.budget import Budget, Cap, DegradeRule, WindowSpec, WorkspaceSettings
from spendfuse.wire.control import Ack, Alert, Command, Heartbeat
from spendfuse.wire.correction import Correction, PackedCorrection, PackedCorrections, TokenDifferences
from spendfuse.wire.ledger import LedgerBatch, LedgerEntry
from spendfuse.wire.packed import Packed, PackedUsage
from spendfuse.wire.prices import PriceBookFile, PriceOverride, PriceRow, Rates
from spendfuse.wire.remaining import Remaining
from spendfuse.wire.rollup import Rollup
from spendfuse.wire.usage import Tokens, Usage, UsagePack, decode_usages

__all__ = [
    "Ack",
    "Alert",
    "Budget",
    "Cap",
    "Command",
    "Correction",
    "DegradeRule",
    "Heartbeat",
    "LedgerBatch",
    "LedgerEntry",
    "Packed",
    "PackedCorrection",
    "PackedCorrections",
    "PackedUsage",
    "PriceBookFile",
    "PriceOverride",
    "PriceRow",
    "Rates",
    "Remaining",
    "Rollup",
    "TokenDifferences",
    "Tokens",
    "Usage",
    "UsagePack",
    "WindowSpec",
    "WireModel",
    "WorkspaceSettings",
    "decode_usages",
    "encode",
]
