"""Stored state: what was written is what is read, and what cannot be read is refused with words."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spendfuse.engine.ids import DIGEST_BYTES, SeenIds
from spendfuse.engine.spend import Hold, Spend
from spendfuse.engine.state import Fired, Fuse, Part, ScopeState, SharedState
from spendfuse.pipeline.codec import (
    READERS,
    SLOT_READERS,
    Reader,
    UnreadableStateError,
    decode_scope,
    decode_shared,
    encode_scope,
    encode_shared,
    is_older_slot,
    restore_slot,
)
from spendfuse.wire.packed import Origin

int64 = st.integers(0, 2**63 - 1)
names = st.text(max_size=20)
totals = st.lists(int64, min_size=3, max_size=3)
spends = st.builds(
    Spend,
    windows=st.dictionaries(names, totals, max_size=4),
    rolling=st.dictionaries(int64, st.dictionaries(int64, totals, max_size=3), max_size=2),
    holds=st.dictionaries(names, st.builds(Hold, int64, int64, int64), max_size=3),
    first_us=int64,
    newest_us=int64,
)
fuses = st.dictionaries(
    names, st.builds(Fuse, int64, st.dictionaries(names, st.builds(Fired, int64, int64, names), max_size=3)), max_size=3
)
scopes = st.builds(
    ScopeState,
    marks=st.dictionaries(st.integers(0, 65_535), int64, max_size=4),
    spend=spends,
    fuses=fuses,
    noted=st.dictionaries(names, int64, max_size=3),
)
shared = st.builds(
    SharedState,
    parts=st.dictionaries(
        st.integers(0, 65_535),
        st.builds(
            Part,
            as_of=int64,
            spend=spends,
            held_nanos=int64,
            held_tokens=int64,
            held_until_us=int64,
            held_steps=st.lists(st.lists(int64, min_size=3, max_size=3), max_size=3),
        ),
        max_size=3,
    ),
    fuses=fuses,
)


@given(scopes)
def test_an_agents_state_is_read_as_it_was_written(state: ScopeState) -> None:
    assert decode_scope(encode_scope(state)) == state


@given(shared)
def test_a_shared_state_is_read_as_it_was_written(state: SharedState) -> None:
    assert decode_shared(encode_shared(state)) == state


@given(scopes, st.data())
def test_half_a_state_is_refused(state: ScopeState, data: st.DataObject) -> None:
    whole = encode_scope(state)
    with pytest.raises(UnreadableStateError, match=r"codec version|cannot be read"):
        decode_scope(whole[: data.draw(st.integers(0, len(whole) - 1))])


@given(st.binary(max_size=80))
def test_any_bytes_are_a_state_or_are_refused(value: bytes) -> None:
    for decode in (decode_scope, decode_shared):
        for version in (b"", b"\x01"):
            with contextlib.suppress(UnreadableStateError):
                decode(version + value)


@pytest.mark.parametrize("decode", [decode_scope, decode_shared])
@pytest.mark.parametrize("version", [b"\x00", b"\x02", b"\x09", b"\xff"])
def test_a_version_that_this_worker_does_not_know_is_refused_with_what_to_do(decode: Any, version: bytes) -> None:
    with pytest.raises(
        UnreadableStateError, match=r"run the version that wrote it, or .*`spendfuse state rebuild`"
    ) as said:
        decode(version + encode_scope(ScopeState())[1:])
    assert repr(version) in str(said.value)


def test_states_of_two_versions_are_read_side_by_side_during_an_upgrade(monkeypatch: pytest.MonkeyPatch) -> None:
    tomorrow = Reader(
        lambda value: ScopeState(noted={"tomorrow": len(value)}),
        lambda value: SharedState(fuses={"t": Fuse(len(value))}),
    )
    monkeypatch.setitem(READERS, b"\x02", tomorrow)
    today = ScopeState(marks={1: 2}, spend=Spend(windows={"run": [1, 2, 3]}, first_us=4, newest_us=5))
    assert decode_scope(encode_scope(today)) == today
    assert decode_scope(b"\x02abc") == ScopeState(noted={"tomorrow": 3})
    assert decode_shared(b"\x02abcd").fuses == {"t": Fuse(4)}
    with pytest.raises(UnreadableStateError, match=r"reads b'\\x01', b'\\x02'"):
        decode_scope(b"\x03")


SCOPE_V1 = (
    "01948101029581b26461794055544340313736373537313230309303040581cd012c81019301020381a1639303040501ce000f424081a3627c6392"
    "0781a177940a14a468616c74c381a16d09"
)
SHARED_V1 = "0192810195029581a372756e930102038080040506070881a3627c63920780"


def test_a_state_that_the_first_version_wrote_is_read() -> None:
    spend = Spend({"day@UTC@1767571200": [3, 4, 5]}, {300: {1: [1, 2, 3]}}, {"c": Hold(3, 4, 5)}, 1, 1_000_000)
    fuses = {"b|c": Fuse(7, {"w": Fired(10, 20, "halt", held=True)})}
    assert decode_scope(bytes.fromhex(SCOPE_V1)) == ScopeState({1: 2}, spend, fuses, {"m": 9})
    run = Spend({"run": [1, 2, 3]}, first_us=4, newest_us=5)
    assert decode_shared(bytes.fromhex(SHARED_V1)) == SharedState({1: Part(2, run, 6, 7, 8)}, {"b|c": Fuse(7)})


digests = st.binary(min_size=DIGEST_BYTES, max_size=DIGEST_BYTES)


@given(st.lists(st.tuples(digests, st.integers(0, 2**47)), unique_by=lambda pair: pair[0]))
def test_remembered_ids_are_the_same_after_a_restart(ids: list[tuple[bytes, int]]) -> None:
    before, after = SeenIds(), SeenIds()
    for digest, offset in ids:
        before.remember(digest, Origin(offset % 7, offset, 3))
    for value in before.take_dirty().values():
        restore_slot(after, value)
    for digest, offset in ids:
        assert after.judge(digest, Origin(offset % 7, offset, 3)) == "replay"
        assert after.judge(digest, Origin(offset % 7 + 1, offset, 3)) == "duplicate"
    assert after.take_dirty() == {}


SLOT_V0 = "0000000000000103" + "000102030405060708090a0b" + "0005" + "0000000000070003" + "ff" * 12 + "ffff" + "00" * 8
"""Slot 259 as every release has written it: a number of eight bytes, of which the first is the version, and two ids."""


def test_a_slot_that_the_first_version_wrote_is_read_and_written_as_it_was() -> None:
    seen = SeenIds()
    restore_slot(seen, bytes.fromhex(SLOT_V0))
    first, second = bytes(range(12)), b"\xff" * 12
    assert seen.sequence == 259
    assert seen.slots == {259: [first, second]}
    assert seen.origins == {first: (5, 0x70003), second: (65_535, 0)}
    seen.dirty.add(259)
    assert seen.take_dirty() == {3: bytes.fromhex(SLOT_V0)}, "a worker of the release before reads it too"


@pytest.mark.parametrize("version", [b"\x01", b"\x02", b"\xff"])
def test_a_slot_of_a_version_that_this_worker_does_not_know_is_refused_with_what_to_do(version: bytes) -> None:
    seen = SeenIds()
    with pytest.raises(
        UnreadableStateError, match=r"run the version that wrote it, or .*`spendfuse state rebuild`"
    ) as said:
        restore_slot(seen, version + bytes.fromhex(SLOT_V0)[1:])
    assert f"{version!r}, and this worker reads b'\\x00'" in str(said.value)
    assert seen == SeenIds(), "nothing of it was taken in"


@pytest.mark.parametrize("length", [0, 1, 7, 9, 29, 31])
def test_half_a_slot_is_refused(length: int) -> None:
    with pytest.raises(UnreadableStateError, match="spendfuse state rebuild"):
        restore_slot(SeenIds(), bytes.fromhex(SLOT_V0)[:length])


def test_slots_of_two_versions_are_read_side_by_side_during_an_upgrade(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SLOT_READERS, b"\x01", lambda seen, value: seen.restore(b"\x00" + value[1:]))
    seen = SeenIds()
    restore_slot(seen, bytes.fromhex(SLOT_V0))
    restore_slot(seen, b"\x01" + bytes.fromhex(SLOT_V0.replace("0103", "0104", 1))[1:])
    assert sorted(seen.slots) == [259, 260]


def test_of_slots_of_two_versions_neither_passes_for_the_older() -> None:
    today = bytes.fromhex(SLOT_V0)
    tomorrow = b"\x01" + today[1:]
    assert not is_older_slot(today, tomorrow)
    assert not is_older_slot(tomorrow, today)
    assert is_older_slot(today[:-22], today)
