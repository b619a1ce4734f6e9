"""Which records are what they say: signed, under their own key, readable."""

from typing import Literal, TypeVar

from pydantic import ValidationError

from spendfuse.client.follow import Record
from spendfuse.client.keys import BadSignature, Verifier
from spendfuse.wire.base import WireModel
from spendfuse.wire.control import Command, Heartbeat
from spendfuse.wire.correction import Correction
from spendfuse.wire.remaining import Remaining
from spendfuse.wire.signing import SIGNATURE_HEADER
from spendfuse.wire.topics import COMMANDS, HEARTBEATS, REMAINING, USAGE

Reason = Literal["tombstone", "topic", "unsigned", "signature", "invalid", "key", "expired", "old", "full"]
"""Why a guard did not obey a record; `old` is a command that a later one of its cap has replaced, or a repetition."""

_M = TypeVar("_M", bound=WireModel)


class Refused(Exception):  # noqa: N818 - an answer more than an error
    """A record that is not to be obeyed, and why."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def scope_of(record: Record) -> str:
    """Return the scope that a record's key names; no more is known of it before its signature is checked."""
    return (record.key or b"").partition(b"|")[0].decode("utf-8", "replace")


def accept(record: Record, verifier: Verifier | None, *, unsigned: bool) -> Command:
    """Return the command in a record, or raise Refused.

    The bytes that came are verified, and only then parsed. A record without value carries no signature: if it
    counted, deleting a record would let a halted agent go. `unsigned` accepts a missing signature, never a wrong one.
    """
    command = _signed(record, COMMANDS.name, Command, verifier, unsigned=unsigned)
    if command.key.encode() != record.key:
        raise Refused("key", "the command is of another scope, budget or cap than its key")
    return command


def accept_remaining(record: Record, verifier: Verifier | None, *, unsigned: bool) -> Remaining:
    """Return what a record of `remaining.v1` says is left, or raise Refused, by the rules of `accept`."""
    left = _signed(record, REMAINING.name, Remaining, verifier, unsigned=unsigned)
    if left.key.encode() != record.key:
        raise Refused("key", "the remaining is of another scope, budget or cap than its key")
    return left


def accept_heartbeat(record: Record, verifier: Verifier | None, *, unsigned: bool) -> Heartbeat:
    """Return the sign of life in a record of `heartbeats.v1`, or raise Refused, by the rules of `accept`.

    Forged, it would keep a guard from noticing that nobody counts any more.
    """
    heartbeat = _signed(record, HEARTBEATS.name, Heartbeat, verifier, unsigned=unsigned)
    if heartbeat.emitter.encode() != record.key:
        raise Refused("key", "the heartbeat is of another emitter than its key")
    return heartbeat


def accept_correction(record: Record, verifier: Verifier | None, *, unsigned: bool) -> Correction:
    """Return the correction in a record of `usage.v1`, or raise Refused, by the rules of `accept`.

    Forged, it would lower a sum, and let a stopped agent go.
    """
    correction = _signed(record, USAGE.name, Correction, verifier, unsigned=unsigned)
    if correction.agent_path.encode() != record.key:
        raise Refused("key", "the correction is of another agent than its key")
    return correction


def _signed(record: Record, topic: str, model: type[_M], verifier: Verifier | None, *, unsigned: bool) -> _M:
    """Return the message in a record of a topic, its signature checked before it is parsed; raises Refused."""
    if record.topic != topic:
        raise Refused("topic", f"{record.topic} is not {topic}")
    value = _verified(record, verifier, unsigned=unsigned)
    try:
        return model.model_validate_json(value)
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise Refused("invalid", f"{where}: {fault['msg']}" if where else fault["msg"]) from None


def _verified(record: Record, verifier: Verifier | None, *, unsigned: bool) -> bytes:
    """Return the value of a record whose signature is right, or missing where it may be."""
    if record.value is None:
        raise Refused("tombstone", "no value")
    header = record.header(SIGNATURE_HEADER)
    if header is None and not unsigned:
        raise Refused("unsigned", "no signature")
    if header is not None and verifier is not None:
        try:
            verifier.verify(record.topic, record.key or b"", record.value, header)
        except BadSignature as error:
            raise Refused("signature", str(error)) from None
    return record.value
