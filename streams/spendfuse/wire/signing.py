"""The bytes that are signed: topic, key and value, so that no signature serves elsewhere."""

from typing import Final

SIGNATURE_HEADER: Final = "spendfuse-sig"
ALGORITHM: Final = "ed25519"
_PREFIX: Final = b"spendfuse-sig-v1\n"


def bytes_to_sign(topic: str, key: bytes, value: bytes) -> bytes:
    """Return the bytes an Ed25519 signature covers.

    Raises `ValueError` for a newline in topic or key: it would shift the boundary between the parts.
    """
    name = topic.encode()
    if b"\n" in name or b"\n" in key:
        raise ValueError("a topic or key with a newline cannot be signed")
    return _PREFIX + name + b"\n" + key + b"\n" + value
