"""What a worker sends late, and where a partition is read from: each loses with Faust alone, and not with the cure."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka.protocol.group import HeartbeatRequest, JoinGroupRequest
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.protocol.produce import ProduceRequest
from faust.stores.memory import Store
from faust.transport.consumer import Consumer
from faust.types import TP

from spendfuse.engine.spend import Spend
from spendfuse.engine.state import Part, ScopeState, SharedState
from spendfuse.pipeline import awake as clocked
from spendfuse.pipeline import faust_cures
from spendfuse.pipeline.awake import Awake
from spendfuse.pipeline.codec import encode_scope, encode_shared

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY = b"0/agent:acme/research/planner"


@pytest.fixture(params=[True, False], ids=["cured", "uncured"])
def cured(request: pytest.FixtureRequest) -> Iterator[bool]:
    if request.param:
        faust_cures.install(20)
    yield request.param
    faust_cures.uninstall()
    faust_cures.take_stale("scopes")


def scope(**marks: int) -> bytes:
    return encode_scope(ScopeState({int(name[1:]): mark for name, mark in marks.items()}))


def recovered(*values: bytes | None, table: str = "scopes") -> dict[bytes, bytes]:
    """Return what a table holds after a changelog with these values of one key."""
    store: Any = Store.__new__(Store)
    store.data, store._key_partition, store.table_name = {}, {}, table
    events = [
        SimpleNamespace(key=KEY, value=value, message=SimpleNamespace(value=value, partition=0)) for value in values
    ]
    store.apply_changelog_batch(events, lambda key: key, lambda value: value)
    return store.data


def test_a_state_that_arrives_late_brings_no_sum_back(cured: bool) -> None:
    newer, late = scope(p0=900, p1=40), scope(p0=300, p1=40)
    assert recovered(scope(p0=200), newer, late) == {KEY: newer if cured else late}
    assert faust_cures.take_stale("scopes") == ({KEY} if cured else set())


@pytest.mark.parametrize(
    ("held", "value"),
    [
        (scope(p0=5), scope(p0=5)),
        (scope(p0=5), scope(p0=6)),
        (scope(p0=5), scope(p0=5, p1=1)),
        (scope(), scope(p3=1)),
        (b"\x07 of another version", scope(p0=1)),
        (scope(p0=9), b"\x01 not a state"),
    ],
)
def test_what_has_counted_as_much_or_cannot_be_read_takes_its_place(held: bytes, value: bytes) -> None:
    faust_cures.install(20)
    try:
        assert recovered(held, value) == {KEY: value}
        assert faust_cures.take_stale("scopes") == set()
    finally:
        faust_cures.uninstall()


def test_a_tombstone_lets_an_older_state_begin_anew(cured: bool) -> None:
    assert recovered(scope(p0=900), None, scope(p0=300)) == {KEY: scope(p0=300)}
    assert recovered(scope(p0=900), None) == {}


def test_shares_and_remembered_ids_are_not_brought_back_either(cured: bool) -> None:
    newer, late = (encode_shared(SharedState({2: Part(as_of, Spend())})) for as_of in (70, 60))
    assert recovered(newer, late, table="shared") == {KEY: newer if cured else late}
    first, second = (number.to_bytes(8, "big") + b"x" * 22 for number in (3, 259))
    assert recovered(second, first, table="ids") == {KEY: second if cured else first}
    fuller = second + b"x" * 22
    assert recovered(fuller, second, table="ids") == {KEY: fuller if cured else second}


class NeverCommitted:
    """A consumer whose fetch on its way has moved the position of a partition of which nothing was ever committed."""

    perform_seek = property(lambda self: lambda: Consumer.perform_seek(self))

    def __init__(self) -> None:
        self.new, self.old, self.changelog = TP("packed", 0), TP("packed", 1), TP("app-scopes-changelog", 0)
        self.positions = {self.new: 49, self.old: 77, self.changelog: 5}
        self._read_offset: dict[TP, int | None] = {}
        self._committed_offset: dict[TP, int] = {}
        self.log = SimpleNamespace(dev=lambda *_: None)

    def assignment(self) -> set[TP]:
        return set(self.positions)

    def _is_changelog_tp(self, place: TP) -> bool:
        return place == self.changelog

    async def seek_to_committed(self) -> dict[TP, int | None]:
        self.positions[self.old] = 50
        return {self.new: None, self.old: 50, self.changelog: None}

    async def earliest_offsets(self, *places: TP) -> dict[TP, int]:
        return dict.fromkeys(places, 0)

    async def _seek(self, place: TP, offset: int) -> None:
        self.positions[place] = offset


async def test_a_partition_of_which_nothing_was_committed_is_read_from_its_beginning(cured: bool) -> None:
    consumer = NeverCommitted()
    await consumer.perform_seek()
    assert consumer.positions == {consumer.new: 0 if cured else 49, consumer.old: 50, consumer.changelog: 5}


class EndedError(Exception):
    """What ends the process, here."""


def ended(silent_s: float) -> None:
    raise EndedError(silent_s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(clocked, "time", SimpleNamespace(monotonic=lambda: now.s))
    return now


class Group:
    """A consumer's client, and the coordinator behind it."""

    def __init__(self, awake: Awake) -> None:
        self.error_code = 0
        awake.listen(self)

    async def send(self, _node: int, _request: object) -> SimpleNamespace:
        return SimpleNamespace(error_code=self.error_code)


def request(kind: type) -> Any:
    return kind.__new__(kind)


async def test_a_worker_cut_off_sends_no_state_until_its_group_answers_it_as_a_member(clock: SimpleNamespace) -> None:
    awake = Awake(9.0, ended)
    group = Group(awake)
    await group.send(0, request(HeartbeatRequest))
    await asyncio.wait_for(awake.before(request(ProduceRequest)), 1.0)
    clock.s += 9.1
    sending = asyncio.create_task(awake.before(request(ProduceRequest)))
    await asyncio.wait_for(awake.before(request(MetadataRequest)), 1.0)  # what changes nothing may go
    group.error_code = 25  # an unknown member: no sign that it owns anything
    await group.send(0, request(HeartbeatRequest))
    done, _ = await asyncio.wait([sending], timeout=3 * clocked.LOOK_AGAIN_S)
    assert not done
    group.error_code = clocked.REBALANCING
    await group.send(0, request(HeartbeatRequest))
    await asyncio.wait_for(sending, 1.0)


async def test_a_worker_cut_off_for_longer_than_its_session_ends_before_it_joins_again(clock: SimpleNamespace) -> None:
    awake = Awake(9.0, ended)
    group = Group(awake)
    await group.send(0, request(JoinGroupRequest))  # the first time there is nothing it could have missed
    clock.s += 8.0
    await group.send(0, request(JoinGroupRequest))
    clock.s += 9.1
    with pytest.raises(EndedError):
        await group.send(0, request(JoinGroupRequest))
