"""Ed25519 over topic, key and value: who may command, and how a guard knows.

A worker holds one private key and signs; a guard holds public keys only and can forge nothing.
Keys are written `kid=<base64 of the 32 raw bytes>`, several separated by commas or white space. A public key that is
being retired is written with its end, `kid=<base64>;until=2026-12-01T00:00:00Z`: from then on it proves nothing.
"""

import base64
import binascii
import logging
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Final, NamedTuple, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from spendfuse.client.clock import wall_clock
from spendfuse.settings import GuardSettings, SettingsError
from spendfuse.wire.base import from_us, rfc3339, to_us
from spendfuse.wire.signing import ALGORITHM, bytes_to_sign
from spendfuse.wire.topics import COMMANDS

KEY_BYTES: Final = 32
KEYS_MAX: Final = 16
SIGNATURE_CHARS: Final = 88
"""Characters of a signature in base64."""
HEADER_BYTES_MAX: Final = 256
_KID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_HEADER: Final = re.compile(rb"ed25519;kid=([A-Za-z0-9][A-Za-z0-9._+-]{0,63});([A-Za-z0-9+/]{86}==)")
_log = logging.getLogger("spendfuse")


class BadSignature(Exception):  # noqa: N818 - named by the design
    """A signature that is missing, of an unknown key, malformed or wrong; the message is the reason."""


class PublicKey(NamedTuple):
    """The 32 raw bytes of a public key, and from when it proves nothing any more (microseconds; None: never)."""

    raw: bytes
    until_us: int | None = None


class Signer:
    """A private key and its id."""

    def __init__(self, kid: str, private: Ed25519PrivateKey) -> None:
        """Raise ValueError for an id that is not 1-64 of A-Z a-z 0-9 . _ + -."""
        self.kid = _checked_kid(kid)
        self._private = private

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the signer of `kid=<base64 of the private key>`; ValueError (without the text) if it is none."""
        keys = parse_keys(text)
        if len(keys) != 1:
            raise ValueError(f"a signing key is one kid=base64, not {len(keys)}")
        ((kid, raw),) = keys.items()
        return cls(kid, Ed25519PrivateKey.from_private_bytes(raw))

    @property
    def public_bytes(self) -> bytes:
        """Return the 32 bytes of the public key."""
        return self._private.public_key().public_bytes_raw()

    def sign(self, topic: str, key: bytes, value: bytes) -> bytes:
        """Return the value of header `spendfuse-sig`: `ed25519;kid=<id>;<base64>`.

        Raises ValueError for a newline in topic or key.
        """
        signature = self._private.sign(bytes_to_sign(topic, key, value))
        return f"{ALGORITHM};kid={self.kid};".encode() + base64.b64encode(signature)


class Verifier:
    """Public keys by id; any of them proves a command until its end.

    The end is judged by `clock`, which must not go back: a clock that is set back revives no key in this process.
    """

    def __init__(self, public: Mapping[str, bytes | PublicKey], clock: Callable[[], int] = wall_clock) -> None:
        """Take the raw 32 bytes of each key; raise ValueError for none, too many, or one that is no key."""
        if not 1 <= len(public) <= KEYS_MAX:
            raise ValueError(f"a verifier takes 1 to {KEYS_MAX} public keys, not {len(public)}")
        keys = {kid: key if isinstance(key, PublicKey) else PublicKey(key) for kid, key in public.items()}
        self._public = {_checked_kid(kid): Ed25519PublicKey.from_public_bytes(key.raw) for kid, key in keys.items()}
        self._until_us = {kid: key.until_us for kid, key in keys.items() if key.until_us is not None}
        self._clock = clock
        self._latest_us = 0

    @classmethod
    def parse(cls, text: str, clock: Callable[[], int] = wall_clock) -> Self:
        """Return the verifier of a list of `kid=<base64>[;until=<RFC 3339>]`; ValueError if it is none."""
        return cls(parse_public_keys(text), clock)

    @property
    def kids(self) -> tuple[str, ...]:
        """Return the ids of the keys, retired ones too."""
        return tuple(self._public)

    @property
    def retiring(self) -> frozenset[str]:
        """Return the ids of the keys that have an end, past or to come."""
        return frozenset(self._until_us)

    def verify(self, topic: str, key: bytes, value: bytes, header: bytes | None) -> str:
        """Return the id of the key that signed exactly these bytes; raise BadSignature with the reason."""
        if header is None:
            raise BadSignature("unsigned")
        kid = signed_by(header)
        if kid is None:
            raise BadSignature("malformed signature header")
        public = self._public.get(kid)
        if public is None:
            raise BadSignature(f"unknown key id {kid}")
        self._refuse_retired(kid)
        try:
            public.verify(base64.b64decode(header[-SIGNATURE_CHARS:], validate=True), bytes_to_sign(topic, key, value))
        except InvalidSignature:
            raise BadSignature(f"wrong signature of key id {kid}") from None
        except ValueError as error:  # a newline in the key
            raise BadSignature(str(error)) from None
        return kid

    def _refuse_retired(self, kid: str) -> None:
        until_us = self._until_us.get(kid)
        if until_us is None:
            return
        self._latest_us = max(self._latest_us, self._clock())
        if self._latest_us >= until_us:
            raise BadSignature(f"key id {kid} was retired at {rfc3339(from_us(until_us))}")


def signed_by(header: bytes | None) -> str | None:
    """Return the key id that a signature header names, None for what is no such header; nothing is verified."""
    form = _HEADER.fullmatch(header) if header is not None and len(header) <= HEADER_BYTES_MAX else None
    return form[1].decode("ascii") if form is not None else None


def parse_public_keys(text: str) -> dict[str, PublicKey]:
    """Return the keys of a list of `kid=<base64>[;until=<RFC 3339>]`; ValueError names the fault."""
    ends: dict[str, int] = {}
    plain: list[str] = []
    for item in _items(text):
        key, semicolon, end = item.partition(";until=")
        plain.append(key)
        if semicolon:
            ends[key.partition("=")[0]] = _instant_us(end)
    return {kid: PublicKey(raw, ends.get(kid)) for kid, raw in parse_keys(",".join(plain)).items()}


def format_public_keys(keys: Mapping[str, PublicKey]) -> str:
    """Return what `parse_public_keys` reads."""
    return ",".join(
        format_keys({kid: key.raw}) + (f";until={rfc3339(from_us(key.until_us))}" if key.until_us is not None else "")
        for kid, key in keys.items()
    )


def _items(text: str) -> list[str]:
    return re.split(r"[,\s]+", text.strip(", \t\r\n"))


def _instant_us(text: str) -> int:
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"a key's end is {text[:40]!r}, not RFC 3339 such as 2026-12-01T00:00:00Z") from None
    if instant.tzinfo is None:
        raise ValueError(f"a key's end is {text[:40]!r}, without its offset: write such as 2026-12-01T00:00:00Z")
    return to_us(instant)


def parse_keys(text: str) -> dict[str, bytes]:
    """Return id -> raw 32 bytes of a list of `kid=base64`; ValueError names the fault, never a key's bytes."""
    keys: dict[str, bytes] = {}
    for nth, item in enumerate(_items(text), start=1):
        kid, equals, encoded = item.partition("=")
        if not equals or _KID.fullmatch(kid) is None:
            raise ValueError(f"key {nth} is not of the form kid=base64, with kid of 1-64 of A-Z a-z 0-9 . _ + -")
        if kid in keys:
            raise ValueError(f"key id {kid} is given twice")
        try:
            raw = base64.b64decode(encoded, validate=True)
        except binascii.Error:
            raise ValueError(f"key {kid} is not base64") from None
        if len(raw) != KEY_BYTES:
            raise ValueError(f"key {kid} has {len(raw)} bytes; an Ed25519 key has {KEY_BYTES}")
        keys[kid] = raw
    return keys


def format_keys(keys: Mapping[str, bytes]) -> str:
    """Return `kid=base64[,kid=base64]`, what `parse_keys` reads."""
    return ",".join(f"{_checked_kid(kid)}={base64.b64encode(raw).decode()}" for kid, raw in keys.items())


def generate(kid: str) -> tuple[str, str]:
    """Return a new key pair as (`kid=<private>`, `kid=<public>`): the worker's secret and the guards' setting."""
    private = Ed25519PrivateKey.generate()
    return (
        format_keys({kid: private.private_bytes_raw()}),
        format_keys({kid: private.public_key().public_bytes_raw()}),
    )


def _checked_kid(kid: str) -> str:
    if _KID.fullmatch(kid) is None:
        raise ValueError(f"key id {kid!r} is not 1-64 of A-Z a-z 0-9 . _ + -")
    return kid


def verifier_of(settings: GuardSettings) -> Verifier | None:
    """Return what proves a command to a guard; None where it obeys anybody. Raises SettingsError without any key."""
    if settings.public_keys:
        try:
            return Verifier.parse(settings.public_keys)
        except ValueError as error:
            raise SettingsError(f"settings cannot be used:\n  SPENDFUSE_PUBLIC_KEYS: {error}") from error
    if not settings.unsigned_commands:
        raise SettingsError(
            "a guard needs the public key of whoever may halt it: set SPENDFUSE_PUBLIC_KEYS=kid=base64 (or "
            "SPENDFUSE_PUBLIC_KEYS_FILE); for development alone, SPENDFUSE_UNSIGNED_COMMANDS=true obeys anybody"
        )
    _log.warning("spendfuse guard obeys unsigned commands: anybody who can write to %s commands it", COMMANDS.name)
    return None


def guard_signer_of(settings: GuardSettings) -> Signer | None:
    """Return what signs a guard's own acks, None where they go unsigned; raises SettingsError, without the key."""
    key = settings.guard_key.get_secret_value()
    if not key:
        return None
    try:
        return Signer.parse(key)
    except ValueError as error:
        raise SettingsError(f"settings cannot be used:\n  SPENDFUSE_GUARD_KEY: {error}") from error
