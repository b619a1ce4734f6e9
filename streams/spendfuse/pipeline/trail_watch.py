"""How far the audit is behind the ledger: one worker watches, says so once when that is too far, and when it is over.

A worker watches and not the audit, since one that is dead says nothing. It is the one whose recorder reads partition 0
of the alerts, so of many workers one. Nothing that decides waits for it.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import structlog
from aiokafka.errors import KafkaError

from spendfuse.audit.lag import LedgerLag
from spendfuse.pipeline.lag import OVER_PART, SCOPE
from spendfuse.wire.base import from_us
from spendfuse.wire.control import Alert

LOOK_S: Final = 10.0
"""Between two looks; each is a consumer of its own, which costs some milliseconds."""
ID_BYTES: Final = 16

log: Any = structlog.get_logger("spendfuse.worker")


@dataclass(slots=True)
class TrailLag:
    """Whether the audit is behind by more than a bound, in seconds."""

    bound_s: int
    behind: bool = False

    def observe(self, lag: LedgerLag, now_ms: int) -> bool | None:
        """Return True when it has fallen behind, False when that is over, None when nothing changed."""
        if not lag.begun:  # no audit has ever run here
            return None
        age_s = lag.age_s(now_ms)
        if not self.behind and age_s > self.bound_s:
            self.behind = True
            return True
        if self.behind and age_s <= self.bound_s // OVER_PART:
            self.behind = False
            return False
        return None


def trail_alert(lag: LedgerLag, now_ms: int, now_us: int, *, over: bool) -> Alert:
    """Return the alert that the audit has fallen behind, or that this is over.

    Who takes the watch over while it stands still says it again under the same id. `now_us` is the deployment's clock.
    """
    name = f"trail\n{lag.oldest_ms or now_ms}\n{over}"
    waiting = f"{lag.messages:,} ledger messages are not in ClickHouse, the oldest for {lag.age_s(now_ms):,} s"
    return Alert(
        id=hashlib.blake2b(name.encode(), digest_size=ID_BYTES).hexdigest(),
        ts=from_us(now_us),
        kind="lag",
        severity="info" if over else "warning",
        scope=SCOPE,
        message=(
            f"the audit has caught up: {waiting}."
            if over
            else f"the audit is behind: {waiting}. Reports are old by that; halts go on without it. See its log."
        )[:512],
    )


async def watch(
    trail: TrailLag,
    look: Callable[[], Awaitable[LedgerLag]],
    *,
    is_mine: Callable[[], bool],
    tell: Callable[[LedgerLag, bool], Awaitable[None]],
    now_ms: Callable[[], int],
    look_s: float = LOOK_S,
) -> None:
    """Look for ever; what Kafka does not answer now it is asked again at the next look.

    `tell` is given a lag and whether it is over; until it returns without a KafkaError, it is called again.
    """
    while True:
        await asyncio.sleep(look_s)
        if not is_mine():
            trail.behind = False
            continue
        try:
            lag = await look()
            was = trail.behind
            turned = trail.observe(lag, now_ms())
            if turned is None:
                continue
            log.warning(
                "the audit is behind" if turned else "the audit has caught up", messages=lag.messages,
                age_s=lag.age_s(now_ms()),
            )  # fmt: skip
            try:
                await tell(lag, not turned)
            except KafkaError:
                trail.behind = was
                raise
        except (KafkaError, OSError, TimeoutError) as error:
            log.info("the audit's lag is not known now", error=str(error) or type(error).__name__)
