"""Changes to a message: of its bytes, and of what its JSON or MessagePack says.

All chance comes from the `random.Random` given.
"""

from __future__ import annotations

import json
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Sequence

TOKENS: Final = (
    b"null", b"true", b"-0", b"1e400", b"NaN", b"-1", b"1.0", b"9223372036854775808", b"1000000001", b'"', b"\\u0000",
    b"\\ud800", b"\xff", b"\x00", b"[[[[", b"{}", b"[]", b",", b":", b'"v":1,', b'"usages":[', b"}{",
    b"\xf0\x9f\x92\xb8", b"\xef\xbb\xbf", b"\x00\x00\x00\x00\x01", b" " * 9, b"\n", b"'", b"- ", b"&a *a",
    b"!!python/object:os.system",
)  # fmt: skip
"""Bytes that decoders have stumbled over."""
VALUES: Final[tuple[Any, ...]] = (
    None, True, False, 0, 1, -1, 1.0, 0.5, -0.0, 1e308, float("nan"), float("inf"), 2**31, 2**47, 2**53, 2**63 - 1,
    2**63, 2**64, 10**30, "", "a", "A" * 129, "x" * 3_000, "\ud800", "\x00", "a\n", "💸", "2026-01-05T09:00:00Z",
    "0001-01-01T00:00:00Z", "9999-12-31T23:59:60+23:59", "2026-01-05T09:00:00.9999999999Z", "finished", "started", "*",
    "agent:a/b/c", [], {}, [[]], [{}], {"a": {}}, "workspace:acme", "../..", "Europe/Amsterdam", "No/Where", "rolling",
)  # fmt: skip
"""Values at the edges of what fields take."""
STATE: Final = b"\x01"
"""How a stored state begins: the version of its codec, then MessagePack."""


def mutated(chance: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Return one of the seeds after a few changes."""
    value = chance.choice(seeds)
    if chance.random() < 0.7:
        changed = _of_content(chance, value)
        if changed is not None:
            return changed
    data = bytearray(value)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        _of_bytes(chance, data, seeds)
    return bytes(data)


def _of_bytes(chance: random.Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    at = chance.randint(0, len(data))
    match chance.randrange(7):
        case 0 if data:
            data[at % len(data)] ^= 1 << chance.randrange(8)
        case 1:
            del data[at : at + chance.choice((1, 1, 2, 8, 64))]
        case 2:
            data[at:at] = chance.choice(TOKENS)
        case 3:
            data[at:at] = data[at : at + chance.randrange(40)]
        case 4:
            data[at:] = b"" if chance.random() < 0.3 else data[at:]
        case 5:
            other = chance.choice(seeds)
            start = chance.randint(0, len(other))
            data[at : at + chance.randrange(20)] = other[start : start + chance.randrange(60)]
        case _:
            data[at : at + 1] = chance.randbytes(chance.randrange(3))


def _of_content(chance: random.Random, value: bytes) -> bytes | None:
    try:
        message = msgspec.msgpack.decode(value[1:], strict=False) if value[:1] == STATE else json.loads(value)
    except (ValueError, RecursionError):
        return None
    gently = chance.random() < 0.4
    for _ in range(chance.choice((1, 1, 2, 3))):
        places = list(_places(message))
        if not places:
            return None
        where, key = chance.choice(places)
        if gently:
            where[key] = _like(chance, where[key])
            continue
        match chance.randrange(5):
            case 0:
                del where[key]
            case 1 if isinstance(where, dict):
                where[chance.choice(("v", "usages", "extra", "", "id", "ts", "tokens", "kind", "deadline"))] = where[
                    key
                ]
            case 2 if isinstance(where, list):
                where.insert(key, where[key])
            case _:
                where[key] = deepcopy(chance.choice(VALUES)) if chance.random() < 0.7 else chance.randint(-5, 2**40)
    try:
        if value[:1] == STATE:
            return STATE + msgspec.msgpack.encode(message)
        return json.dumps(message, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
    except (OverflowError, RecursionError, TypeError, ValueError):
        return None


def _like(chance: random.Random, value: Any) -> Any:
    """Return another value of the same kind, so that more is taken in and not all is refused."""
    if isinstance(value, bool) or value is None or isinstance(value, float):
        return value
    if isinstance(value, int):
        return chance.choice((0, 1, chance.randrange(10**9), value + 1, 10**9))
    if isinstance(value, str):
        return value[: chance.randint(1, 40)] + chance.choice(("", "", "a", ".b", "-9"))
    return value


def _places(message: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container with each of its keys, however deep."""
    waiting = [message]
    while waiting:
        value = waiting.pop()
        keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        for key in keys:
            yield value, key
            waiting.append(value[key])
