"""Which records are commands."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spendfuse.client.accept import Refused, accept, scope_of
from spendfuse.client.follow import Record
from spendfuse.client.keys import Signer, Verifier, generate
from spendfuse.wire import Command, encode
from spendfuse.wire.base import EPOCH
from spendfuse.wire.signing import SIGNATURE_HEADER
from spendfuse.wire.topics import COMMANDS

PRIVATE, PUBLIC = generate("k")
SIGNER, VERIFIER = Signer.parse(PRIVATE), Verifier.parse(PUBLIC)
HALT = Command(id="0" * 32, seq=1, action="halt", scope="team:acme/research", budget="b", cap="day", issued_at=EPOCH)
KEY, VALUE = HALT.key.encode(), encode(HALT)


def record(key: bytes | None = KEY, value: bytes | None = VALUE, header: bytes | None = None) -> Record:
    headers = ((SIGNATURE_HEADER, header),) if header is not None else ()
    return Record(COMMANDS.name, 0, 0, 0, key, value, headers)


def signed(key: bytes = KEY, value: bytes = VALUE) -> Record:
    return record(key, value, SIGNER.sign(COMMANDS.name, key, value))


def test_a_signed_command_under_its_key_is_accepted() -> None:
    assert accept(signed(), VERIFIER, unsigned=False) == HALT
    assert scope_of(signed()) == "team:acme/research"


@pytest.mark.parametrize(
    ("given_record", "reason"),
    [
        (record(value=None), "tombstone"),
        (record(), "unsigned"),
        (record(header=b"nonsense"), "signature"),
        (signed(value=b"{}"), "invalid"),
        (signed(value=VALUE.replace(b'"halt"', b'"kill"')), "invalid"),
        (signed(key=b"team:acme/research|b|month"), "key"),
        (signed()._replace(topic="spendfuse.commands.v2"), "topic"),
        (signed()._replace(key=None), "signature"),
    ],
)
def test_any_other_record_is_refused_with_its_reason(given_record: Record, reason: str) -> None:
    with pytest.raises(Refused) as caught:
        accept(given_record, VERIFIER, unsigned=False)
    assert caught.value.reason == reason


def test_unsigned_mode_accepts_a_missing_signature_but_not_a_wrong_one() -> None:
    assert accept(record(), None, unsigned=True) == HALT
    assert accept(record(), VERIFIER, unsigned=True) == HALT
    with pytest.raises(Refused, match="signature"):
        accept(record(header=SIGNER.sign(COMMANDS.name, KEY, b"other")), VERIFIER, unsigned=True)
    with pytest.raises(Refused, match="tombstone"):
        accept(record(value=None), None, unsigned=True)


@given(st.binary(max_size=200), st.none() | st.binary(max_size=200))
def test_bytes_of_any_kind_are_refused_not_crashed_on(key: bytes, value: bytes | None) -> None:
    with pytest.raises(Refused):
        accept(record(key, value), None, unsigned=True)
    assert isinstance(scope_of(record(key, value)), str)
