"""How state is written: one version byte, then MessagePack of plain integers and strings."""

from typing import Final, TypeVar

import msgspec

from spendfuse.engine.spend import Hold, Spend
from spendfuse.engine.state import Fired, Fuse, Part, ScopeState, SharedState

VERSION: Final = b"\x01"

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


_encoder: Final = msgspec.msgpack.Encoder()
_scope_decoder: Final = msgspec.msgpack.Decoder(_Scope)
_shared_decoder: Final = msgspec.msgpack.Decoder(_Shared)


_T = TypeVar("_T")


class UnreadableStateError(Exception):
    """A stored state that this version cannot read: it must not be guessed at, since it is money."""


def encode_scope(state: ScopeState) -> bytes:
    """Return a scope's state as bytes."""
    return VERSION + _encoder.encode(
        _Scope(state.marks, _plain_spend(state.spend), _plain_fuses(state.fuses), state.noted)
    )


def decode_scope(value: bytes) -> ScopeState:
    """Return a scope's state.

    Raises `UnreadableStateError`.
    """
    plain = _decode(_scope_decoder, value)
    return ScopeState(plain.marks, _spend(plain.spend), _fuses(plain.fuses), plain.noted)


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
    plain = _decode(_shared_decoder, value)
    parts = {
        partition: Part(
            part.as_of, _spend(part.spend), part.held_nanos, part.held_tokens, part.held_until_us, part.held_steps
        )
        for partition, part in plain.parts.items()
    }
    return SharedState(parts, _fuses(plain.fuses))


def _decode(decoder: "msgspec.msgpack.Decoder[_T]", value: bytes) -> _T:
    if value[:1] != VERSION:
        raise UnreadableStateError(
            f"a state record has codec version {value[:1]!r}, and this worker reads {VERSION!r}: "
            "run the version that wrote it, or rebuild the state from the ledger"
        )
    try:
        return decoder.decode(value[1:])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # msgspec leaves the text of a key to Python
        raise UnreadableStateError(f"a state record of {len(value)} bytes cannot be read: {error}") from error


def _plain_spend(spend: Spend) -> _Spend:
    return _Spend(spend.windows, spend.rolling, spend.holds, spend.first_us, spend.newest_us)


def _spend(plain: _Spend) -> Spend:
    return Spend(plain.windows, plain.rolling, plain.holds, plain.first_us, plain.newest_us)


def _plain_fuses(fuses: dict[str, Fuse]) -> _Fuses:
    return {key: (fuse.seq, fuse.fired) for key, fuse in fuses.items()}


def _fuses(plain: _Fuses) -> dict[str, Fuse]:
    return {key: Fuse(seq, fired) for key, (seq, fired) in plain.items()}
