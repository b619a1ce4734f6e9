"""Which records of `commands.v1` are commands: signed, under their own key, readable."""

from typing import Literal

from pydantic import ValidationError

from spendfuse.client.follow import Record
from spendfuse.client.keys import BadSignature, Verifier
from spendfuse.wire.control import Command
from spendfuse.wire.remaining import Remaining
from spendfuse.wire.signing import SIGNATURE_HEADER
from spendfuse.wire.topics import COMMANDS, REMAINING

Reason = Literal["tombstone", "topic", "unsigned", "signature", "invalid", "key", "expired", "old", "full"]
"""Why a guard did not obey a record; `old` is a command that a later one of its cap has replaced, or a repetition."""


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
    if record.topic != COMMANDS.name:
        raise Refused("topic", f"{record.topic} is not {COMMANDS.name}")
    if record.value is None:
        raise Refused("tombstone", "no value")
    key = record.key or b""
    header = record.header(SIGNATURE_HEADER)
    if header is None and not unsigned:
        raise Refused("unsigned", "no signature")
    if header is not None and verifier is not None:
        try:
            verifier.verify(record.topic, key, record.value, header)
        except BadSignature as error:
            raise Refused("signature", str(error)) from None
    try:
        command = Command.model_validate_json(record.value)
    except ValidationError as error:
        raise Refused("invalid", f"{error.error_count()} faults, the first: {error.errors()[0]['msg']}") from None
    if command.key.encode() != key:
        raise Refused("key", "the command is of another scope, budget or cap than its key")
    return command


def accept_remaining(record: Record, verifier: Verifier | None, *, unsigned: bool) -> Remaining:
    """Return what a record of `remaining.v1` says is left, or raise Refused, by the rules of `accept`."""
    if record.topic != REMAINING.name:
        raise Refused("topic", f"{record.topic} is not {REMAINING.name}")
    if record.value is None:
        raise Refused("tombstone", "no value")
    key = record.key or b""
    header = record.header(SIGNATURE_HEADER)
    if header is None and not unsigned:
        raise Refused("unsigned", "no signature")
    if header is not None and verifier is not None:
        try:
            verifier.verify(record.topic, key, record.value, header)
        except BadSignature as error:
            raise Refused("signature", str(error)) from None
    try:
        left = Remaining.model_validate_json(record.value)
    except ValidationError as error:
        raise Refused("invalid", f"{error.error_count()} faults, the first: {error.errors()[0]['msg']}") from None
    if left.key.encode() != key:
        raise Refused("key", "the remaining is of another scope, budget or cap than its key")
    return left
