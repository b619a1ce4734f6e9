"""A reader that is told to stop leaves its group: otherwise its partitions wait until its session has run out."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from spendfuse.pipeline import services
from spendfuse.pipeline.services import GroupReader
from spendfuse.settings import BrokerSettings

DEADLINE_S = 10.0


class SlowConsumer:
    """Stands in for aiokafka's: one batch, then silence; leaving takes several turns of the loop."""

    made: ClassVar[list[SlowConsumer]] = []

    def __init__(self, **_options: Any) -> None:
        self.did: list[str] = []
        self.idle = asyncio.Event()
        self.batches = [{"usage-0": [SimpleNamespace(offset=0)]}]
        self.made.append(self)

    def subscribe(self, _topics: list[str], listener: Any) -> None:
        self.listener = listener

    async def start(self) -> None:
        await self.listener.on_partitions_assigned(set())

    async def getmany(self, **_options: Any) -> dict[str, list[Any]]:
        if self.batches:
            return self.batches.pop()
        self.idle.set()
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    async def commit(self) -> None:
        self.did.append("commit")

    async def stop(self) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        self.did.append("left")


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> GroupReader:
    SlowConsumer.made.clear()
    monkeypatch.setattr(services, "Consumer", SlowConsumer)
    return GroupReader(BrokerSettings.from_env({}, bootstrap_servers="127.0.0.1:1"), ["usage"], "group", 10)


async def test_what_was_handled_is_committed_before_a_reader_leaves(reader: GroupReader) -> None:
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def handle(_batches: Any) -> None:
        begun.set()
        await may_end.wait()
        SlowConsumer.made[0].did.append("handled")

    async with asyncio.timeout(DEADLINE_S):
        reading = asyncio.create_task(reader.run(handle))
        await begun.wait()
        leaving = asyncio.create_task(reader.leave())
        await asyncio.sleep(0)
        may_end.set()
        await leaving
        await reading
    assert SlowConsumer.made[0].did == ["handled", "commit", "left"]


async def test_a_reader_with_nothing_to_read_leaves_without_waiting_for_its_poll(reader: GroupReader) -> None:
    begun = asyncio.Event()

    async def handle(_batches: Any) -> None:
        begun.set()

    async with asyncio.timeout(DEADLINE_S):
        reading = asyncio.create_task(reader.run(handle))
        await begun.wait()
        await SlowConsumer.made[0].idle.wait()
        await reader.leave()
        await reading
    assert SlowConsumer.made[0].did[-1] == "left"


@pytest.mark.parametrize("times", [1, 2, 3])
async def test_a_reader_that_is_cancelled_while_it_leaves_has_left_all_the_same(
    reader: GroupReader, times: int
) -> None:
    begun = asyncio.Event()

    async def handle(_batches: Any) -> None:
        begun.set()

    async with asyncio.timeout(DEADLINE_S):
        reading = asyncio.create_task(reader.run(handle))
        await begun.wait()
        for _ in range(times):  # as mode cancels what its services run, until it is done
            await asyncio.sleep(0)
            reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await reader.leave()
    assert SlowConsumer.made[0].did[-1:] == ["left"]


async def test_a_reader_that_never_began_is_left_at_once(reader: GroupReader) -> None:
    async with asyncio.timeout(DEADLINE_S):
        await reader.leave()
    assert SlowConsumer.made == []
