"""Whether what this process knows is still its own to write: not once it was frozen, or cut off, beyond its session."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

from aiokafka.protocol.group import HeartbeatRequest, JoinGroupRequest, SyncGroupRequest
from aiokafka.protocol.produce import ProduceRequest

LOOK_AGAIN_S: Final = 0.05
REBALANCING: Final = 27
"""Kafka's error code of a heartbeat that came while the group rebalances: the member is still known."""


class Awake:
    """Knows whether others may own this process's partitions without its knowledge; then it must end, or wait.

    Frozen (SIGSTOP, a paused machine) beyond its session it must end: what it has in hand is older than the new
    owner's. Cut off from its group it cannot tell, so nothing leaves it until a heartbeat is answered: either it is
    still a member, and nobody else has owned anything, or it has to join again, and then it ends.
    """

    def __init__(self, bound_s: float, on_frozen: Callable[[float], None]) -> None:
        """Take the longest silence in seconds, less than a session, and what ends the process."""
        self._bound_s = bound_s
        self._on_frozen = on_frozen
        self._ticked_at: float | None = None
        self._heard_at: float | None = None

    def tick(self) -> None:
        """Say that the loop runs; call it far more often than the bound."""
        self.check()
        self._ticked_at = time.monotonic()

    def check(self) -> None:
        """Call `on_frozen` with the seconds since the last tick when these are too many."""
        if self._ticked_at is not None and time.monotonic() - self._ticked_at > self._bound_s:
            self._on_frozen(time.monotonic() - self._ticked_at)

    def heard(self, sent_at: float) -> None:
        """Say that the group answered as to a member what was sent at an instant of the monotonic clock."""
        self._heard_at = sent_at

    @property
    def _silent_s(self) -> float:
        return 0.0 if self._heard_at is None else time.monotonic() - self._heard_at

    def joins(self) -> None:
        """Say that the group is about to be joined; after too long a silence others have been owners meanwhile."""
        if self._silent_s > self._bound_s:
            self._on_frozen(self._silent_s)

    async def before(self, request: Any) -> None:
        """Return when a request of the producer may go: at once, or once the group has answered again."""
        self.check()
        while isinstance(request, ProduceRequest) and self._silent_s > self._bound_s:
            await asyncio.sleep(LOOK_AGAIN_S)  # the session runs out, or the group answers: neither waits for us
            self.check()

    def listen(self, client: Any) -> None:
        """Hear what the group answers to a consumer, through its aiokafka client."""
        send = client.send

        async def heard_send(node_id: Any, request: Any, **options: Any) -> Any:
            if isinstance(request, JoinGroupRequest):
                self.joins()
            sent_at = time.monotonic()
            answer = await send(node_id, request, **options)
            if isinstance(request, HeartbeatRequest) and answer.error_code in (0, REBALANCING):
                self.heard(sent_at)
            elif isinstance(request, JoinGroupRequest | SyncGroupRequest) and answer.error_code == 0:
                self.heard(time.monotonic())  # a join is answered when all have joined
            return answer

        client.send = heard_send
