"""The memory of usage ids: replays, duplicates, its bound, and that it survives a restart."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factories import usage
from spendfuse.engine.ids import IDS_PER_SLOT, SLOTS, SeenIds, call_digest
from spendfuse.wire.packed import Origin
from spendfuse.wire.usage import Usage


def digest_of(message: Usage, kind: str = "") -> bytes:
    return call_digest(message.agent_path, message.id, kind or message.kind)


def digest(nth: int) -> bytes:
    return nth.to_bytes(12, "big")


def filled(count: int, first: int = 0) -> SeenIds:
    seen = SeenIds()
    for nth in range(first, first + count):
        seen.remember(digest(nth), Origin(1, nth, 0))
    return seen


def restored(slots: list[bytes]) -> SeenIds:
    seen = SeenIds()
    for value in slots:
        seen.restore(value)
    return seen


def test_the_same_id_from_the_same_place_is_a_replay_and_from_another_a_duplicate() -> None:
    seen = filled(1)
    assert seen.judge(digest(0), Origin(1, 0, 0)) == "replay"
    for other in (Origin(1, 0, 1), Origin(1, 1, 0), Origin(2, 0, 0)):
        assert seen.judge(digest(0), other) == "duplicate"
    assert seen.judge(digest(1), Origin(1, 0, 0)) == "new"


def test_an_id_belongs_to_its_agent_and_kind() -> None:
    several = [usage(1), usage(2), usage(1, agent="other"), usage(1, team="other"), usage(1, kind="started")]
    assert len({digest_of(message) for message in several}) == len(several)
    assert digest_of(usage(1, run="r2", output=9)) == digest_of(usage(1)), "sent again with other numbers"
    assert digest_of(usage(1, kind="progress"), "finished") == digest_of(usage(1))


def test_the_memory_is_a_ring_that_keeps_at_least_its_horizon() -> None:
    total = SLOTS * IDS_PER_SLOT + 3 * IDS_PER_SLOT + 5
    seen = filled(total)
    assert len(seen.slots) == SLOTS
    assert (SLOTS - 1) * IDS_PER_SLOT <= len(seen.origins) <= SLOTS * IDS_PER_SLOT
    assert all(digest(nth) in seen.origins for nth in range(total - (SLOTS - 1) * IDS_PER_SLOT, total))
    assert digest(0) not in seen.origins
    written = seen.take_dirty()
    assert set(written) == set(range(SLOTS)), "a place in the ring is written over, never added"
    again = restored(list(written.values()))
    assert again.origins == seen.origins


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 2 * IDS_PER_SLOT), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_what_was_written_batch_by_batch_restores_in_any_order(batches: list[int], random: object) -> None:
    seen, places, nth = SeenIds(), {}, 0
    for size in batches:
        for _ in range(size):
            seen.remember(digest(nth), Origin(3, nth, nth % 7))
            nth += 1
        places |= seen.take_dirty()
        assert seen.take_dirty() == {}
    slots = list(places.values())
    random.shuffle(slots)  # type: ignore[attr-defined]
    again = restored(slots)
    assert again.origins == seen.origins
    assert again.sequence == seen.sequence
    again.remember(digest(nth), Origin(3, nth, 0))
    assert len(again.take_dirty()) == 1, "one id more writes one slot"


def test_a_slot_of_the_round_before_is_stale_and_never_kept_beside_newer_ones() -> None:
    old = filled(5).take_dirty()[0]
    newer = SeenIds(sequence=SLOTS + 3)
    newer.remember(digest(77), Origin(0, 77, 0))
    (value,) = newer.take_dirty().values()
    for order in ([old, value], [value, old]):
        again = restored(order)
        assert set(again.origins) == {digest(77)}
        assert len(again.slots) == 1


def test_the_greatest_position_can_be_written() -> None:
    seen = SeenIds()
    greatest = Origin(65_535, 2**47 - 1, 65_535)
    seen.remember(digest(1), greatest)
    assert restored(list(seen.take_dirty().values())).judge(digest(1), greatest) == "replay"


@pytest.mark.parametrize("value", [b"", b"\x00" * 7, b"\x00" * 9, b"\x00" * 29])
def test_bytes_that_are_no_slot_are_refused_with_their_length(value: bytes) -> None:
    with pytest.raises(ValueError, match=f"has {len(value)} bytes"):
        SeenIds().restore(value)
