"""The end of a Faust recovery, its race decided: Faust's own Recovery, Consumer and queue over a partition in memory.

A fetch is in flight when the source partition is resumed. It returns before the seek does, and a hundred of its
messages are queued by then; the others arrive when the recovery is over. Nothing here waits for a clock.
"""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import faust
from faust.transport.consumer import Consumer
from faust.types import TP
from faust.types.tuples import ConsumerMessage

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Set as AbstractSet

SOURCE: Final = TP("usage", 0)
END: Final = 150
COMMITTED: Final = 3
QUEUED: Final = 100
"""Messages in the agent's queue when the recovery clears it: after so many, Faust lets others run between two."""


class MemoryConsumer(Consumer):
    """A consumer of one partition of `END` messages, of which `COMMITTED` are committed."""

    def __init__(self, app: Any, queue: Any) -> None:
        transport = SimpleNamespace(app=app, create_transaction_manager=lambda **_: None)
        super().__init__(transport, self._deliver, None, None)  # type: ignore[arg-type]  # no rebalance happens here
        self.fetching = asyncio.Event()
        self.recovered = asyncio.Event()
        self._queue = queue
        self._fetchable = asyncio.Event()
        self._dropped = False
        self._position = COMMITTED
        self._seeks = self._delivered = 0

    def assignment(self) -> set[TP]:
        return {SOURCE}

    def highwater(self, tp: TP) -> int:  # noqa: ARG002 - the interface's
        return END

    async def _getmany(self, active_partitions: AbstractSet[TP] | None, timeout: float) -> Any:  # noqa: ARG002, ASYNC109 - the interface's
        self.fetching.set()
        await self._fetchable.wait()
        records = {SOURCE: list(range(self._position, END))}
        self._position = END
        return records

    def _to_message(self, tp: TP, record: Any) -> ConsumerMessage:
        return ConsumerMessage(tp.topic, tp.partition, record, 0.0, 0, (), None, None, None)

    async def seek_to_committed(self) -> Mapping[TP, int]:
        self._seeks += 1
        if self._seeks == 1:  # the recovery's own: the fetch in flight returns before it does
            self._fetchable.set()
            while not self._dropped and self._read_offset[SOURCE] != COMMITTED + QUEUED - 1:  # noqa: ASYNC110 - Faust signals nobody
                await asyncio.sleep(0)
        else:  # Faust's, since the flow was stopped when the fetch returned: what it brought is dropped
            self._dropped = True
        self._position = COMMITTED
        return {SOURCE: COMMITTED}

    async def _deliver(self, message: ConsumerMessage) -> None:
        await self.app.flow_control.acquire()
        if self._delivered == QUEUED:
            await self.recovered.wait()
        self._delivered += 1
        self._queue.force_put_nowait(message)


MemoryConsumer.__abstractmethods__ = frozenset()  # what else a consumer does has no part in this


async def after_a_recovery(deadline_s: float) -> tuple[list[int], int]:
    """Return the offsets that reach an agent when its worker is ready, and what is committed when it has acked them."""
    app = faust.App("race", store="memory://", web_enabled=False, broker_commit_interval=1)
    app.loop = asyncio.get_running_loop()
    app.finalize()
    app._fetcher = SimpleNamespace(maybe_start=_nothing)
    app.topics = SimpleNamespace(acks_enabled_for=lambda _: True)
    queue = app.topic(SOURCE.topic, value_type=bytes).queue
    consumer = app._consumer = MemoryConsumer(app, queue)
    consumer.pause_partitions({SOURCE})
    consumer._set_active_tps({SOURCE, TP("changelog", 0)})
    app.flow_control.resume()
    draining = asyncio.create_task(consumer._drain_messages(SimpleNamespace(_stopped=asyncio.Event())))
    try:
        async with asyncio.timeout(deadline_s):
            await consumer.fetching.wait()
            await app.tables.recovery.on_recovery_completed(app.consumer_generation_id)
            consumer.recovered.set()
            messages = []
            while not messages or messages[-1].offset < END - 1:
                messages.append(await queue.get())
    finally:
        consumer._stopped.set()
        draining.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await draining
    for message in messages:
        consumer.ack(message)
    committed = consumer._committed_offset
    while (offset := consumer._new_offset(SOURCE)) is not None:
        committed[SOURCE] = offset
    return [message.offset for message in messages], committed[SOURCE]


async def _nothing() -> None: ...
