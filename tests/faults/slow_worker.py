"""A worker with the recovery race of Faust made wide: `python -m faults.slow_worker`, in place of the real one.

The seek after a recovery takes longer than the poll (1 s) that began before it, and every message takes 4 ms.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread

from spendfuse.pipeline import refusal, worker
from spendfuse.pipeline.meter import MeterStage

SEEK_S = 1.5
WORK_S = 0.004


def slow_down() -> None:
    seek, on_record = AIOKafkaConsumerThread.seek_to_committed, MeterStage.on_record

    async def slow_seek(self: Any, *args: Any, **options: Any) -> Any:
        await asyncio.sleep(SEEK_S)
        return await seek(self, *args, **options)

    async def slow_record(self: Any, record: Any) -> None:
        time.sleep(WORK_S)  # noqa: ASYNC251 - work, not waiting
        await on_record(self, record)

    async def vouch(self: Any, *args: Any) -> None:
        """Refuse nothing: the test writes packed usage of records that `usage.v1` never had."""

    refusal.Ends.vouch = vouch  # type: ignore[method-assign]
    AIOKafkaConsumerThread.seek_to_committed = slow_seek
    MeterStage.on_record = slow_record  # type: ignore[method-assign]


if __name__ == "__main__":
    slow_down()
    sys.exit(worker.main())
