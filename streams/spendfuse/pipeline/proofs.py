"""Whose acks are proved: signed by a key that was enrolled for the agent, else only claimed.

A guard obeys, and says so in `acks.v1`, to which every guard may write. An ack that a guard signs with a key of its own
is proved by it: so is only what the key was enrolled for, so that a stolen guard speaks for its own agents and no
others. Nothing is decided by an ack, proved or not: who spends after a halt is found by what it spends (`violations`).

Keys are enrolled as `kid=base64[;scope=team:acme/research][;until=<RFC 3339>]`, several separated by commas.
"""

import base64
import re
from collections.abc import Mapping
from typing import Any, Final, Self

from spendfuse.client.keys import BadSignature, PublicKey, Verifier, parse_public_keys, signed_by
from spendfuse.pipeline.records import SourceRecord
from spendfuse.settings import SettingsError, WorkerSettings
from spendfuse.wire.base import SCOPE_PATTERN
from spendfuse.wire.control import Ack
from spendfuse.wire.scopes import scope_kind
from spendfuse.wire.signing import SIGNATURE_HEADER
from spendfuse.wire.topics import ACKS

GUARD_KEYS_MAX: Final = 10_000
_SCOPE: Final = re.compile(r";scope=([^;,\s]+)")
_BOUND_TO: Final = ("agent", "team", "workspace")


class GuardKeys:
    """The enrolled keys of guards, each with the scope whose agents it speaks for (None: all)."""

    def __init__(self, keys: Mapping[str, PublicKey], scopes: Mapping[str, str]) -> None:
        """Take keys and scopes by key id; raises ValueError for too many keys, or one that is none."""
        if len(keys) > GUARD_KEYS_MAX:
            raise ValueError(f"{len(keys)} guard keys are enrolled, and a worker takes {GUARD_KEYS_MAX}")
        self._verifiers = {kid: Verifier({kid: key}) for kid, key in keys.items()}
        self._scopes = dict(scopes)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the keys of a list of `kid=base64[;scope=...][;until=...]`; ValueError names the fault."""
        if not text.strip(", \t\r\n"):
            return cls({}, {})
        scopes: dict[str, str] = {}
        plain: list[str] = []
        for item in re.split(r"[,\s]+", text.strip(", \t\r\n")):
            kid = item.partition("=")[0]
            if found := _SCOPE.search(item):
                scopes[kid] = found[1]
                if not re.fullmatch(SCOPE_PATTERN, found[1]) or scope_kind(found[1]) not in _BOUND_TO:
                    raise ValueError(
                        f"guard key {kid[:64]} is bound to {found[1][:80]}, not an agent, team or workspace"
                    )
            plain.append(_SCOPE.sub("", item))
        return cls(parse_public_keys(",".join(plain)), scopes)

    @classmethod
    def of(cls, settings: WorkerSettings) -> Self:
        """Return the keys that the settings enrol; raises SettingsError."""
        try:
            return cls.parse(settings.guard_keys)
        except ValueError as error:
            raise SettingsError(f"SPENDFUSE_GUARD_KEYS cannot be used: {error}") from error

    def proof(self, record: SourceRecord, ack: Ack) -> dict[str, Any] | None:
        """Return what proves an ack, with the bytes that were signed; None for one that is only claimed.

        Claimed is what is unsigned, or signed by a key that is not enrolled, or no longer. Raises ValueError for what
        pretends to be proved: a wrong signature of an enrolled key, or an agent that the key does not speak for.
        """
        header = next((value for name, value in reversed(record.headers) if name == SIGNATURE_HEADER), None)
        kid = signed_by(header)
        verifier = self._verifiers.get(kid or "")
        if header is None or kid is None or verifier is None:
            return None
        key, value = record.key or b"", record.value or b""
        try:
            verifier.verify(ACKS.name, key, value, header)
        except BadSignature as error:
            if "was retired" in str(error):
                return None
            raise ValueError(f"ack of {ack.agent}: {error}") from None
        if key != ack.scope.encode():
            raise ValueError(f"ack of {ack.agent}: its key is not its scope")
        bound = self._scopes.get(kid)
        if bound is not None and not _covers(bound, ack.agent):
            raise ValueError(f"ack of {ack.agent}: guard key {kid} speaks for {bound} alone")
        return {
            "proves": "ack",
            "kid": kid,
            "guard": ack.guard,
            "agent": ack.agent,
            "command_id": ack.command_id,
            "state": ack.state,
            **said_of(ack),
            "signature": header.decode("ascii"),
            "value_base64": base64.b64encode(value).decode(),
        }


def claim(ack: Ack) -> dict[str, Any] | None:
    """Return what an ack that nothing proves says of calls in flight and of tokens spent since; None if it does not."""
    said = said_of(ack)
    if not said:
        return None
    return {
        "claims": "ack",
        "guard": ack.guard,
        "agent": ack.agent,
        "command_id": ack.command_id,
        "state": ack.state,
        **said,
    }


def said_of(ack: Ack) -> dict[str, int]:
    """Return the counts of an ack that are no columns of the trail."""
    counts = {"calls_in_flight": ack.calls_in_flight, "tokens_since": ack.tokens_since}
    return {name: count for name, count in counts.items() if count is not None}


def _covers(scope: str, agent: str) -> bool:
    """Say whether an agent is a scope, or below it."""
    path, below = agent.partition(":")[2], scope.partition(":")[2]
    return path == below or path.startswith(f"{below}/")
