"""Signatures: the golden vector of the contract, and everything that must not pass for one."""

from __future__ import annotations

import base64
import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from spendfuse.client.keys import (
    BadSignature,
    PublicKey,
    Signer,
    Verifier,
    format_keys,
    format_public_keys,
    generate,
    parse_keys,
    parse_public_keys,
)

# The vector of facts/control-and-law.md, section 3: a test key, and a value of 748 bytes whatever its schema.
PRIVATE = bytes(range(32))
PUBLIC = bytes.fromhex("03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8")
TOPIC = "spendfuse.commands.v1"
KEY = b"agent:acme/platform/cc-build-bot|pol_agent_day_usd"
VALUE = json.dumps(
    {
        "v": 1,
        "kind": "budget.command",
        "scope": "agent:acme/platform/cc-build-bot",
        "seq": 1795445087012042,
        "level": "stop",
        "action": "terminate",
        "issued_at": "2026-11-23T14:44:47.012Z",
        "not_before": "2026-11-23T14:44:47.012Z",
        "expires_at": "2026-11-23T23:00:00Z",
        "policy": {"id": "pol_agent_day_usd", "version": 7},
        "window": {
            "kind": "day",
            "tz": "Europe/Amsterdam",
            "start": "2026-11-22T23:00:00Z",
            "end": "2026-11-23T23:00:00Z",
        },
        "measure": {
            "unit": "usd",
            "limit_nano": 50000000000,
            "spent_nano": 50123450000,
            "tokens": 11034000,
            "events": 412,
        },
        "cause": {
            "event_id": "anthropic:req_0412",
            "topic": "spendfuse.usage.v1",
            "partition": 3,
            "offset": 918273,
        },
        "degrade": None,
        "message": "Daily cap of USD 50.00 reached (spent 50.12). Resets 2026-11-24 00:00 Europe/Amsterdam.",
        "retry_after_s": 29713,
    },
    separators=(",", ":"),
).encode()
HEADER = (
    b"ed25519;kid=sf-2026-11;NV8tLOV2duD9/F8e63n1P0OcA0HcCL7KOyTillYxSlTl3QkWaID0HNZiO+ovvRMg3p7y5poZmlnil0dHNdKDDQ=="
)
SIGNER = Signer("sf-2026-11", Ed25519PrivateKey.from_private_bytes(PRIVATE))
VERIFIER = Verifier({"sf-2026-11": PUBLIC})


def test_the_golden_vector_signs_to_the_golden_header() -> None:
    assert len(VALUE) == 748
    assert SIGNER.public_bytes == PUBLIC
    assert SIGNER.sign(TOPIC, KEY, VALUE) == HEADER


def test_the_golden_header_verifies_and_names_its_key() -> None:
    assert VERIFIER.verify(TOPIC, KEY, VALUE, HEADER) == "sf-2026-11"


SIGNATURE = HEADER.rpartition(b";")[2]


@pytest.mark.parametrize(
    ("topic", "key", "value", "header", "reason"),
    [
        ("spendfuse.commands.v2", KEY, VALUE, HEADER, "wrong signature"),
        (TOPIC, KEY + b"x", VALUE, HEADER, "wrong signature"),
        (TOPIC, KEY, VALUE.replace(b"stop", b"warn"), HEADER, "wrong signature"),
        (TOPIC, KEY, b"", HEADER, "wrong signature"),
        (TOPIC, b"a\nb", VALUE, HEADER, "newline"),
        (TOPIC, KEY, VALUE, None, "unsigned"),
        (TOPIC, KEY, VALUE, b"", "malformed"),
        (TOPIC, KEY, VALUE, b"ed25519;kid=other;" + SIGNATURE, "unknown key id other"),
        (TOPIC, KEY, VALUE, b"hmac;kid=sf-2026-11;" + SIGNATURE, "malformed"),
        (TOPIC, KEY, VALUE, b"ed25519;kid=;" + SIGNATURE, "malformed"),
        (TOPIC, KEY, VALUE, HEADER + b"\n", "malformed"),
        (TOPIC, KEY, VALUE, HEADER[:-4], "malformed"),
        (TOPIC, KEY, VALUE, b"ed25519;kid=sf-2026-11;" + b"A" * 10_000, "malformed"),
        (TOPIC, KEY, VALUE, b"ed25519;kid=sf-2026-11;" + base64.b64encode(bytes(64)), "wrong signature"),
    ],
)
def test_anything_but_the_signed_bytes_is_refused_with_its_reason(
    topic: str, key: bytes, value: bytes, header: bytes | None, reason: str
) -> None:
    with pytest.raises(BadSignature, match=reason):
        VERIFIER.verify(topic, key, value, header)


@given(st.binary(max_size=300))
def test_no_header_whatever_crashes_a_verifier(header: bytes) -> None:
    with pytest.raises(BadSignature):
        VERIFIER.verify(TOPIC, KEY, VALUE, header)


def test_a_key_or_topic_with_a_newline_cannot_be_signed() -> None:
    with pytest.raises(ValueError, match="newline"):
        SIGNER.sign(TOPIC, b"a\nb", VALUE)
    with pytest.raises(ValueError, match="newline"):
        SIGNER.sign("a\nb", KEY, VALUE)


def test_a_generated_pair_signs_and_verifies_beside_an_older_key() -> None:
    private, public = generate("sf-2027-01")
    header = Signer.parse(private).sign(TOPIC, KEY, VALUE)
    both = Verifier.parse(f"{format_keys({'sf-2026-11': PUBLIC})}, {public}\n")
    assert both.verify(TOPIC, KEY, VALUE, header) == "sf-2027-01"
    assert both.verify(TOPIC, KEY, VALUE, HEADER) == "sf-2026-11"
    assert generate("sf-2027-01")[0] != private


@given(
    st.dictionaries(
        st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}", fullmatch=True),
        st.binary(min_size=32, max_size=32),
        min_size=1,
        max_size=5,
    )
)
def test_written_keys_are_read_back(keys: dict[str, bytes]) -> None:
    assert parse_keys(format_keys(keys)) == keys


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "key 1 is not of the form kid=base64"),
        ("c2VjcmV0", "key 1 is not of the form kid=base64"),
        ("a b=x", "key 1 is not of the form kid=base64"),
        ("k=!!secret!!", "key k is not base64"),
        ("k=c2VjcmV0", "key k has 6 bytes; an Ed25519 key has 32"),
        (f"{format_keys({'k': PUBLIC})},{format_keys({'k': PUBLIC})}", "key id k is given twice"),
        ("bad;id=c2VjcmV0", "key 1 is not of the form kid=base64"),
    ],
)
def test_keys_that_are_none_are_refused_without_being_shown(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        parse_keys(text)
    assert "c2VjcmV0" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_signing_key_is_exactly_one() -> None:
    private, _ = generate("a")
    other, _ = generate("b")
    with pytest.raises(ValueError, match="one kid=base64, not 2"):
        Signer.parse(f"{private},{other}")


def test_a_key_with_an_end_proves_nothing_after_it_even_when_the_clock_is_set_back() -> None:
    now = [0]
    text = f"{format_keys({'sf-2026-11': PUBLIC})};until=1970-01-01T00:00:10Z"
    verifier = Verifier.parse(text, lambda: now[0])
    assert verifier.retiring == {"sf-2026-11"}
    now[0] = 9_999_999
    assert verifier.verify(TOPIC, KEY, VALUE, HEADER) == "sf-2026-11"
    for now[0] in (10_000_000, 0):
        with pytest.raises(BadSignature, match=r"retired at 1970-01-01T00:00:10\.000000Z"):
            verifier.verify(TOPIC, KEY, VALUE, HEADER)


@given(
    st.dictionaries(
        st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}", fullmatch=True),
        st.builds(PublicKey, st.binary(min_size=32, max_size=32), st.none() | st.integers(0, 2**52)),
        min_size=1,
        max_size=5,
    )
)
def test_written_public_keys_are_read_back_with_their_ends(keys: dict[str, PublicKey]) -> None:
    assert parse_public_keys(format_public_keys(keys)) == keys


@pytest.mark.parametrize("end", ["", "tomorrow", "2026-12-01T00:00:00", "2026-12-01"])
def test_an_end_that_is_no_instant_is_refused(end: str) -> None:
    with pytest.raises(ValueError, match="a key's end is"):
        parse_public_keys(f"{format_keys({'k': PUBLIC})};until={end}")
