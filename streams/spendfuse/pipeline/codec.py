"""How state is written: one version byte, then MessagePack of plain integers and strings; or a slot of remembered ids.

A release reads a version before any release writes it: workers of two neighbouring releases take partitions from each
other during a rolling upgrade. What no entry of `READERS` reads is refused with words.
"""

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple, TypeVar

import msgspec

from spendfuse.engine.ids import SeenIds
from spendfuse.engine.spend import Hold, Spend
from spendfuse.engine.state import Applied, Fired, Fuse, Part, ScopeState, SharedState

SLOT_HEAD_BYTES: Final = 8
"""Of a slot of remembered ids: its number in the ring's rounds, big-endian (`engine/ids.py`)."""
VERSION: Final = b"\x01"
"""The version that is written."""
SLOT_VERSION: Final = b"\x00"
"""The version of slots that is written: their first byte too, since a slot's number never reaches 2**56."""

_Windows = dict[str, list[int]]
_Rolling = dict[int, dict[int, list[int]]]
_Fuses = dict[str, tuple[int, dict[str, Fired]]]


class _Spend(msgspec.Struct, array_like=True):
    windows: _Windows
    rolling: _Rolling
    holds: dict[str, Hold]
    first_us: int
    newest_us: int


class _Scope(msgspec.Struct, array_like=True):
    marks: dict[int, int]
    spend: _Spend
    fuses: _Fuses
    noted: dict[str, int]
    corrected: dict[str, Applied] = {}


class _Part(msgspec.Struct, array_like=True):
    as_of: int
    spend: _Spend
    held_nanos: int
    held_tokens: int
    held_until_us: int
    held_steps: list[list[int]] = []


class _Shared(msgspec.Struct, array_like=True):
    parts: dict[int, _Part]
    fuses: _Fuses


class _Marks(msgspec.Struct, array_like=True):
    """The head of a scope's state; what follows is skipped."""

    marks: dict[int, int]


class _AsOf(msgspec.Struct, array_like=True):
    as_of: int


class _SharedAsOf(msgspec.Struct, array_like=True):
    parts: dict[int, _AsOf]


_encoder: Final = msgspec.msgpack.Encoder()
_marks_decoder: Final = msgspec.msgpack.Decoder(_Marks)
_as_of_decoder: Final = msgspec.msgpack.Decoder(_SharedAsOf)
_scope_decoder: Final = msgspec.msgpack.Decoder(_Scope)
_shared_decoder: Final = msgspec.msgpack.Decoder(_Shared)


_T = TypeVar("_T")


class UnreadableStateError(Exception):
    """A stored state that this version cannot read: it must not be guessed at, since it is money."""


def encode_scope(state: ScopeState) -> bytes:
    """Return a scope's state as bytes."""
    return VERSION + _encoder.encode(
        _Scope(state.marks, _plain_spend(state.spend), _plain_fuses(state.fuses), state.noted, state.corrected)
    )


def decode_scope(value: bytes) -> ScopeState:
    """Return a scope's state.

    Raises `UnreadableStateError`.
    """
    return _read(value, lambda reader: reader.scope)


def _scope_v1(value: bytes) -> ScopeState:
    plain = _scope_decoder.decode(value)
    return ScopeState(plain.marks, _spend(plain.spend), _fuses(plain.fuses), plain.noted, plain.corrected)


def encode_shared(state: SharedState) -> bytes:
    """Return a shared scope's state as bytes."""
    parts = {
        partition: _Part(
            part.as_of,
            _plain_spend(part.spend),
            part.held_nanos,
            part.held_tokens,
            part.held_until_us,
            part.held_steps,
        )
        for partition, part in state.parts.items()
    }
    return VERSION + _encoder.encode(_Shared(parts, _plain_fuses(state.fuses)))


def decode_shared(value: bytes) -> SharedState:
    """Return a shared scope's state.

    Raises `UnreadableStateError`.
    """
    return _read(value, lambda reader: reader.shared)


def _shared_v1(value: bytes) -> SharedState:
    plain = _shared_decoder.decode(value)
    parts = {
        partition: Part(
            part.as_of, _spend(part.spend), part.held_nanos, part.held_tokens, part.held_until_us, part.held_steps
        )
        for partition, part in plain.parts.items()
    }
    return SharedState(parts, _fuses(plain.fuses))


class Reader(NamedTuple):
    """How the states of one version are read, without the version byte; raises `msgspec.DecodeError`."""

    scope: Callable[[bytes], ScopeState]
    shared: Callable[[bytes], SharedState]


READERS: Final[dict[bytes, Reader]] = {b"\x01": Reader(_scope_v1, _shared_v1)}
"""Every version that can be read."""


SLOT_READERS: Final[dict[bytes, Callable[[SeenIds, bytes], None]]] = {SLOT_VERSION: SeenIds.restore}
"""Every version of slots that can be read; a reader takes the whole slot, and raises `ValueError`."""


def restore_slot(seen: SeenIds, value: bytes) -> None:
    """Take a slot of remembered ids into the ring.

    Raises `UnreadableStateError`.
    """
    reader = SLOT_READERS.get(value[:1])
    if reader is None:
        raise _unknown_version("a slot of remembered ids", value, SLOT_READERS)
    try:
        reader(seen, value)
    except ValueError as error:
        raise UnreadableStateError(
            f"{error}: write the state anew from the ledger with `spendfuse state rebuild`"
        ) from error


def _read(value: bytes, of: Callable[[Reader], Callable[[bytes], _T]]) -> _T:
    reader = READERS.get(value[:1])
    if reader is None:
        raise _unknown_version("a state record", value, READERS)
    try:
        return of(reader)(value[1:])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # msgspec leaves the text of a key to Python
        raise UnreadableStateError(
            f"a state record of {len(value)} bytes cannot be read ({error}): write the state anew from the ledger with "
            "`spendfuse state rebuild`"
        ) from error


def _unknown_version(what: str, value: bytes, readers: Iterable[bytes]) -> UnreadableStateError:
    known = ", ".join(repr(version) for version in sorted(readers))
    return UnreadableStateError(
        f"{what} has codec version {value[:1]!r}, and this worker reads {known}: run the version that "
        "wrote it, or write the state anew with `spendfuse state rebuild`"
    )


def is_older_scope(value: bytes, held: bytes) -> bool:
    """Say whether a scope's state has counted less than another: some watermark of it is lower, or missing.

    False where either cannot be read: that is for whoever reads the state to refuse.
    """
    return _is_behind(value, held, lambda plain: _marks_decoder.decode(plain).marks)


def is_older_shared(value: bytes, held: bytes) -> bool:
    """Say whether a shared scope's state knows an older share of some partition than another, or none; as above."""
    return _is_behind(
        value, held, lambda plain: {number: part.as_of for number, part in _as_of_decoder.decode(plain).parts.items()}
    )


def is_older_slot(value: bytes, held: bytes) -> bool:
    """Say whether a slot of remembered ids is of an earlier round of the ring than another, or holds fewer of it.

    False where either is of another version, as above.
    """
    if value[:1] != SLOT_VERSION or held[:1] != SLOT_VERSION:
        return False
    head = slice(0, SLOT_HEAD_BYTES)
    return (value[head], len(value)) < (held[head], len(held))


def _is_behind(value: bytes, held: bytes, marks_of: Callable[[bytes], dict[int, int]]) -> bool:
    if value[:1] != VERSION or held[:1] != VERSION:
        return False
    try:
        marks, known = marks_of(value[1:]), marks_of(held[1:])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return any(mark > marks.get(partition, -1) for partition, mark in known.items())


def _plain_spend(spend: Spend) -> _Spend:
    return _Spend(spend.windows, spend.rolling, spend.holds, spend.first_us, spend.newest_us)


def _spend(plain: _Spend) -> Spend:
    return Spend(plain.windows, plain.rolling, plain.holds, plain.first_us, plain.newest_us)


def _plain_fuses(fuses: dict[str, Fuse]) -> _Fuses:
    return {key: (fuse.seq, fuse.fired) for key, fuse in fuses.items()}


def _fuses(plain: _Fuses) -> dict[str, Fuse]:
    return {key: Fuse(seq, fired) for key, (seq, fired) in plain.items()}
