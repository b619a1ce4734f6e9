"""The latest genuine command of each scope, budget and cap, as it was written: what nobody may erase.

`commands.v1` is compacted: a forged record, a tombstone or an old command written again under a key would, in time, be
all that is left of it, and a guard that starts then would not know of the halt. So what is genuine is written again.
"""

from typing import Final, NamedTuple

from spendfuse.client.accept import Refused, accept, accept_correction
from spendfuse.client.follow import Record
from spendfuse.client.keys import Verifier, signed_by
from spendfuse.pipeline.proofs import GuardKeys
from spendfuse.pipeline.records import Headers, SourceRecord
from spendfuse.pipeline.violations import Halts
from spendfuse.wire.base import to_us
from spendfuse.wire.control import Command
from spendfuse.wire.correction import Correction
from spendfuse.wire.signing import SIGNATURE_HEADER

KEPT_MAX: Final = 10_000
"""Most keys remembered; beyond it the one that was written first is forgotten."""


class Kept(NamedTuple):
    """A genuine command, its bytes, and where and when (milliseconds, by its writer's clock) it was first written."""

    command: Command
    offset: int
    timestamp_ms: int
    key: bytes
    value: bytes
    headers: Headers

    @property
    def kid(self) -> str | None:
        """Return the id of the key that signed it; None for an unsigned one (development)."""
        return signed_by(next((value for name, value in reversed(self.headers) if name == SIGNATURE_HEADER), None))


class Register:
    """Genuine commands by key; `verifier` is None only where commands go unsigned (development)."""

    def __init__(self, verifier: Verifier | None, guards: GuardKeys | None = None, kept_max: int = KEPT_MAX) -> None:
        """`guards`: the keys that prove acks."""
        self.halts = Halts(kept_max)
        self.guards = guards or GuardKeys({}, {})
        self.verifier = verifier
        self._kept_max = kept_max
        self._kept: dict[bytes, Kept] = {}
        self._by_scope: dict[str, set[bytes]] = {}

    def accept(self, record: SourceRecord) -> Command:
        """Return the command of a record of `commands.v1` and remember it; raises Refused for what is not genuine."""
        seen = Record(*record[:4], record.key, record.value, tuple(record.headers))
        command = accept(seen, self.verifier, unsigned=self.verifier is None)
        key = record.key or b""
        kept = self._kept.get(key)
        if kept is None or command.seq > kept.command.seq:
            place = record.offset, record.timestamp_ms
            self._kept[key] = Kept(command, *place, key, record.value or b"", tuple(record.headers))
            self._by_scope.setdefault(command.scope, set()).add(key)
            if len(self._kept) > self._kept_max:
                self._forget(next(iter(self._kept)))
        elif record.value == kept.value:  # written again, perhaps under another signature: that one counts
            self._kept[key] = kept._replace(headers=tuple(record.headers))
        self.halts.take(command)
        return command

    def correction(self, record: SourceRecord) -> Correction:
        """Return the correction of a record of `usage.v1`, signed as a command is; raises Refused."""
        seen = Record(*record[:4], record.key, record.value, tuple(record.headers))
        return accept_correction(seen, self.verifier, unsigned=self.verifier is None)

    def follow(self, record: Record) -> None:
        """Take in what a follower reads; what is refused is the recorder's to report."""
        source = SourceRecord(*record[:6], headers=record.headers)
        try:
            self.accept(source)
        except Refused:
            return

    def latest(self, key: bytes | None) -> Kept | None:
        """Return the genuine command of the highest `seq` of a key, None if there is none."""
        return self._kept.get(key or b"")

    def _forget(self, key: bytes) -> None:
        scope = self._kept.pop(key).command.scope
        keys = self._by_scope[scope]
        keys.discard(key)
        if not keys:
            del self._by_scope[scope]

    def of_scope(self, scope: str) -> list[Command]:
        """Return the genuine command of the highest `seq` of each budget and cap of a scope."""
        return [self._kept[key].command for key in self._by_scope.get(scope, ())]

    def is_retiring(self, kept: Kept) -> bool:
        """Say whether the key that signed a command has an end: no guard would believe the command after it."""
        return self.verifier is not None and kept.kid in self.verifier.retiring

    def to_sign_again(self, now_us: int) -> list[Kept]:
        """Return what still holds and is signed by a key that has an end."""
        return [
            kept
            for kept in self._kept.values()
            if self.is_retiring(kept)
            and kept.command.action != "warn"
            and (kept.command.expires_at is None or to_us(kept.command.expires_at) > now_us)
        ]
