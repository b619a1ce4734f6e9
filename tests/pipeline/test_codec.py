"""Stored state: what was written is what is read, and what cannot be read is refused with words."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spendfuse.engine.ids import DIGEST_BYTES, SeenIds
from spendfuse.engine.spend import Hold, Spend
from spendfuse.engine.state import Fired, Fuse, Part, ScopeState, SharedState
from spendfuse.pipeline.codec import (
    UnreadableStateError,
    decode_scope,
    decode_shared,
    encode_scope,
    encode_shared,
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


def test_a_version_of_tomorrow_is_refused_with_what_to_do() -> None:
    with pytest.raises(UnreadableStateError, match="run the version that wrote it, or rebuild"):
        decode_scope(b"\x02" + encode_scope(ScopeState())[1:])


digests = st.binary(min_size=DIGEST_BYTES, max_size=DIGEST_BYTES)


@given(st.lists(st.tuples(digests, st.integers(0, 2**47)), unique_by=lambda pair: pair[0]))
def test_remembered_ids_are_the_same_after_a_restart(ids: list[tuple[bytes, int]]) -> None:
    before, after = SeenIds(), SeenIds()
    for digest, offset in ids:
        before.remember(digest, Origin(offset % 7, offset, 3))
    for value in before.take_dirty().values():
        after.restore(value)
    for digest, offset in ids:
        assert after.judge(digest, Origin(offset % 7, offset, 3)) == "replay"
        assert after.judge(digest, Origin(offset % 7 + 1, offset, 3)) == "duplicate"
    assert after.take_dirty() == {}
