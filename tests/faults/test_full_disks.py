"""Full disks: of the broker, of what a worker and the programs around it write. Each is said, and gone on from."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from faults.refusing import Pressed, RefusingKafka, beats, fill, live
from kraft import KraftUnavailableError, kraft_missing
from pipeline import scenario
from spendfuse.client import Guard, GuardState
from spendfuse.settings import GuardSettings
from spendfuse.wire.topics import HEARTBEATS

if TYPE_CHECKING:
    from pathlib import Path

CALLS = 60
END_S = 150.0


@pytest.mark.kafka
@pytest.mark.timeout(300)
async def test_a_broker_with_a_full_disk_silences_the_worker_and_everything_goes_on_with_room(tmp_path: Path) -> None:
    reason = kraft_missing()
    if reason is not None:
        pytest.skip(reason)
    try:
        kafka = await asyncio.to_thread(RefusingKafka(on_small_disk=True).start)
    except KraftUnavailableError as error:
        pytest.skip(str(error))
    with kafka:
        pressed = await asyncio.to_thread(Pressed, kafka, tmp_path)
        settings = GuardSettings.from_env({}, public_keys=scenario.PUBLIC, stale_after_s=3.0, blind_after_s=8.0)
        try:
            await asyncio.to_thread(pressed.run)
            async with scenario.watching(pressed.deployed) as watch:
                guard = Guard(scenario.identity("chaos", "agent-1"), pressed.broker, settings)
                try:
                    await pressed.emit(watch, CALLS)
                    await pressed.exact(watch)
                    await watch.until(lambda: guard.state is GuardState.LIVE, "a guard that is live")
                    filler = await asyncio.to_thread(fill, kafka.data)
                    emitting = asyncio.create_task(pressed.emit(watch, CALLS))
                    await watch.until(lambda: guard.state is GuardState.BLIND, "a guard that trusts nobody", END_S)
                    said = len(watch.records[HEARTBEATS.name])
                    filler.unlink()
                    await asyncio.to_thread(kafka.restart)
                    await emitting
                    await asyncio.to_thread(pressed.run)  # if it has ended meanwhile, as its supervisor would
                    await pressed.exact(watch)
                    assert any(live(beat) for beat in beats(watch, said))
                    await watch.until(lambda: guard.state is GuardState.LIVE, "a guard that is live again")
                finally:
                    await asyncio.to_thread(guard.close)
        finally:
            pressed.worker.stop()
