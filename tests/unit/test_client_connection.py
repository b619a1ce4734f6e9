"""A client of Kafka that is closed: nobody waits for it longer than said."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from spendfuse.client.connection import close

if TYPE_CHECKING:
    import pytest

WITHIN_S = 0.1
DEADLINE_S = 30.0


class Hanging:
    """As aiokafka's consumer with a fetch on its way: its stop does not end, and a cancellation is swallowed once."""

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()

    async def stop(self) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            await asyncio.Event().wait()


class Failing:
    async def stop(self) -> None:
        raise ConnectionError("the broker has gone")


class Slow:
    def __init__(self) -> None:
        self.stopped = False

    async def stop(self) -> None:
        await asyncio.sleep(0)
        self.stopped = True


async def test_a_stop_that_hangs_and_ignores_its_cancellation_is_left_behind() -> None:
    end = Hanging()
    began = time.monotonic()
    async with asyncio.timeout(DEADLINE_S):
        await close(end, WITHIN_S)
        assert time.monotonic() - began >= WITHIN_S
        await end.cancelled.wait()


async def test_a_stop_that_ends_is_waited_for_and_its_error_goes_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    end = Slow()
    await close(end, DEADLINE_S)
    assert end.stopped
    await close(Failing(), DEADLINE_S)
    assert not caplog.records
