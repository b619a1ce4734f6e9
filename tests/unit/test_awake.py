"""A process that was frozen for longer than its session ends before it writes a state that may be too old."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from spendfuse.pipeline import awake as clocked
from spendfuse.pipeline.awake import Awake
from spendfuse.pipeline.tables import FaustTable


class FrozenError(Exception):
    """What ends the process, here."""


def ended(silent_s: float) -> None:
    raise FrozenError(silent_s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(clocked, "time", SimpleNamespace(monotonic=lambda: now.s))
    return now


@pytest.mark.parametrize(("pause_s", "ends"), [(0.2, False), (9.0, False), (9.1, True), (3_600.0, True)])
def test_it_ends_when_it_did_not_run_for_longer_than_the_bound(
    clock: SimpleNamespace, pause_s: float, *, ends: bool
) -> None:
    awake = Awake(9.0, ended)
    awake.check()  # before the first tick it has nothing to write
    awake.tick()
    clock.s += pause_s
    for look in (awake.check, awake.tick):
        if ends:
            with pytest.raises(FrozenError):
                look()
        else:
            look()


def test_a_frozen_process_neither_changes_nor_sends_a_state(clock: SimpleNamespace) -> None:
    sent: list[Any] = []

    class Outbox:
        async def put(self, *given: Any, **more: Any) -> Any:
            sent.append((given, more))

    topic = SimpleNamespace(get_topic_name=lambda: "changelog")
    plain = SimpleNamespace(data={b"k": b"old"}, changelog_topic=topic)
    awake = Awake(9.0, ended)
    table = FaustTable(plain, Outbox(), awake)
    awake.tick()
    clock.s += 10.0
    with pytest.raises(FrozenError):
        table.write(0, b"k", b"new")
    with pytest.raises(FrozenError):
        table.delete(0, b"k")
    assert (plain.data, sent) == ({b"k": b"old"}, [])
