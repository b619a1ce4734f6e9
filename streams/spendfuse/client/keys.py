"""Ed25519 over topic, key and value: who may command, and how a guard knows.

A worker holds one private key and signs; a guard holds public keys only and can forge nothing.
Keys are written `kid=<base64 of the 32 raw bytes>`, several separated by commas or white space.
"""

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Final, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from spendfuse.wire.signing import ALGORITHM, bytes_to_sign

KEY_BYTES: Final = 32
KEYS_MAX: Final = 16
HEADER_BYTES_MAX: Final = 256
_KID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_HEADER: Final = re.compile(rb"ed25519;kid=([A-Za-z0-9][A-Za-z0-9._+-]{0,63});([A-Za-z0-9+/]{86}==)")


class BadSignature(Exception):  # noqa: N818 - named by the design
    """A signature that is missing, of an unknown key, malformed or wrong; the message is the reason."""


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
    """Public keys by id."""

    def __init__(self, public: Mapping[str, bytes]) -> None:
        """Take the raw 32 bytes of each key; raise ValueError for none, too many, or one that is no key."""
        if not 1 <= len(public) <= KEYS_MAX:
            raise ValueError(f"a verifier takes 1 to {KEYS_MAX} public keys, not {len(public)}")
        self._public = {_checked_kid(kid): Ed25519PublicKey.from_public_bytes(raw) for kid, raw in public.items()}

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the verifier of a list of `kid=<base64 of the public key>`; ValueError if it is none."""
        return cls(parse_keys(text))

    def verify(self, topic: str, key: bytes, value: bytes, header: bytes | None) -> str:
        """Return the id of the key that signed exactly these bytes; raise BadSignature with the reason."""
        if header is None:
            raise BadSignature("unsigned")
        form = _HEADER.fullmatch(header) if len(header) <= HEADER_BYTES_MAX else None
        if form is None:
            raise BadSignature("malformed signature header")
        kid = form[1].decode("ascii")
        public = self._public.get(kid)
        if public is None:
            raise BadSignature(f"unknown key id {kid}")
        try:
            public.verify(base64.b64decode(form[2], validate=True), bytes_to_sign(topic, key, value))
        except InvalidSignature:
            raise BadSignature(f"wrong signature of key id {kid}") from None
        except ValueError as error:  # a newline in the key
            raise BadSignature(str(error)) from None
        return kid


def parse_keys(text: str) -> dict[str, bytes]:
    """Return id -> raw 32 bytes of a list of `kid=base64`; ValueError names the fault, never a key's bytes."""
    keys: dict[str, bytes] = {}
    for nth, item in enumerate(re.split(r"[,\s]+", text.strip(", \t\r\n")), start=1):
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
