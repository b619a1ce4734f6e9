"""Ctrl-C ends a demo even if a library that was just closing something has swallowed the cancellation."""

import asyncio
import contextlib

import pytest

from spendfuse.demo.stage import end_if_interrupted


async def test_a_swallowed_cancellation_is_noticed_at_the_next_step() -> None:
    async def demo() -> str:
        end_if_interrupted()  # nobody has cancelled it yet
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        end_if_interrupted()
        return "went on"

    task = asyncio.create_task(demo())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
