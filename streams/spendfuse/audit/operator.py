"""What an operator does to the trail, as signed entries of the ledger; written before it is done.

A statement is compact JSON; its Ed25519 signature covers `spendfuse.ledger.v1`, the key `operator` and its bytes, and
lies beside it in the entry's data, so that it can be checked in the database long after the record has gone.
"""

import json
import secrets
from datetime import datetime
from typing import Any, Final

from spendfuse.client.keys import BadSignature, Signer, Verifier
from spendfuse.wire.base import encode, from_us, rfc3339, to_us
from spendfuse.wire.ledger import LedgerBatch, LedgerEntry
from spendfuse.wire.topics import LEDGER

ORIGIN: Final = "operator"
"""The origin of these entries: no topic, so it counts milliseconds instead of offsets."""
KEY: Final = b"operator"
_US_PER_MS: Final = 1_000
_INDEX_BITS: Final = 16


def message(action: str, about: dict[str, Any], *, by: str, reason: str, at: datetime, signer: Signer | None) -> bytes:
    """Return the ledger message that says an operator does something at an instant of the machine's clock.

    Without a signer (development only) the signature is empty.
    """
    said = {"action": action, "at": rfc3339(at), "by": by, "reason": reason, **about}
    statement = json.dumps(said, separators=(",", ":"), ensure_ascii=False)
    signature = signer.sign(LEDGER.name, KEY, statement.encode()).decode() if signer else ""
    entry = LedgerEntry(
        kind="operator",
        topic=ORIGIN,
        partition=0,
        offset=to_us(at) // _US_PER_MS,
        index=secrets.randbits(_INDEX_BITS),
        at=from_us(to_us(at)),
        data={"action": action, "statement": statement, "signature": signature},
    )
    return encode(LedgerBatch(entries=[entry]))


def read(data: str, verifier: Verifier | None) -> dict[str, Any] | None:
    """Return what an entry's data says; None when it says nothing, or not by a key of the verifier's.

    Without a verifier every statement is taken at its word.
    """
    try:
        document = json.loads(data)
        statement, signature = document["statement"], document["signature"]
        if verifier is not None:
            verifier.verify(LEDGER.name, KEY, statement.encode(), signature.encode())
        said = json.loads(statement)
    except (ValueError, KeyError, TypeError, AttributeError, BadSignature):
        return None
    return said if isinstance(said, dict) else None
