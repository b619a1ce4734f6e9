"""What a fuse remembers of its firings: what stands, what is news, what is forgotten, and how its sequence grows."""

import hashlib
from collections.abc import Mapping
from typing import Final

from spendfuse.engine.crossings import Crossing
from spendfuse.engine.policies import Limit
from spendfuse.engine.state import Fired, Fuse
from spendfuse.engine.windows import SECOND_US
from spendfuse.wire.base import SAFE_INTEGER_MAX
from spendfuse.wire.budget import BASIS_POINTS, Budget, DegradeRule
from spendfuse.wire.control import Degrade

US_PER_MS: Final = 1_000
SEQ_PER_MS: Final = 1_000
FIRED_MAX: Final = 256
"""Most windows whose firing one fuse remembers: more than the hours of the longest grace (7 days)."""
SEQ_KEPT_US: Final = 45 * 86_400_000_000
"""How long a withdrawn budget's sequence is remembered: as long as its commands lie in their topic."""
SHADOW: Final = "shadow "


def next_seq(last: int, ts_us: int) -> int:
    """Return a growing sequence from event time, so that it is the same on a replay and survives a lost state."""
    return min(max(last + 1, ts_us // US_PER_MS * SEQ_PER_MS), SAFE_INTEGER_MAX)


def standing_of(fuse: Fuse, now_us: int) -> dict[str, Fired]:
    """Return what was ordered and has not run out, by window key."""
    return {key: fired for key, fired in fuse.fired.items() if fired.until_us > now_us}


def is_live(standing: Mapping[str, Fired]) -> bool:
    """Say whether any of it was sent, and not only recorded."""
    return any(not fired.order.startswith(SHADOW) for fired in standing.values())


def clear(fuse: Fuse, standing: Mapping[str, Fired]) -> None:
    """Forget what stands, since it is withdrawn."""
    for key in standing:
        del fuse.fired[key]


def is_news(crossing: Crossing, fuse: Fuse, now_us: int) -> bool:
    """Say whether a crossing has not fired yet, and asks for no less than what stands."""
    key, reach = crossing.window.key, (crossing.fraction, crossing.until_us)
    fired = fuse.fired.get(key)
    if fired is not None and crossing.fraction <= fired.fraction:
        if crossing.limit.cap.window.rolling_s is None:
            return False
        prolongs = crossing.fraction == fired.fraction and crossing.until_us > fired.until_us
        return prolongs or fired.until_us <= now_us
    # An emitter's clock may be ahead, and its usage in a window that has not begun. Both windows' orders have one key,
    # and the last one counts: a lesser one waits until the stricter has run out.
    return crossing.until_us <= now_us or not any(
        name != key and other[:2] > reach for name, other in standing_of(fuse, now_us).items()
    )


def remember(fuse: Fuse, crossing: Crossing, now_us: int) -> None:
    """Note that a crossing fired; what its command pushes out is forgotten, so that the next usage says it again."""
    if crossing.window.end_us > now_us:
        for key, other in standing_of(fuse, now_us).items():
            if key != crossing.window.key and other.until_us > crossing.until_us:
                del fuse.fired[key]
    keep_fired(fuse, crossing.window.key, fired_by(crossing), now_us - crossing.limit.budget.grace_s * SECOND_US)


def keep_fired(fuse: Fuse, key: str, fired: Fired, closed_us: int) -> None:
    """Remember what fired in a window; what had run out by an instant is forgotten, and the oldest beyond the most."""
    for old in [name for name, other in fuse.fired.items() if other.until_us <= closed_us]:
        del fuse.fired[old]
    fuse.fired[key] = fired
    while len(fuse.fired) > FIRED_MAX:
        del fuse.fired[min(fuse.fired, key=lambda name: fuse.fired[name].until_us)]


def fired_by(crossing: Crossing) -> Fired:
    """Return what is remembered of a crossing that fires."""
    alone = crossing.spend * BASIS_POINTS >= crossing.fraction * crossing.limit.cap.amount
    return Fired(crossing.fraction, crossing.until_us, order_of(crossing.limit, crossing.action), held=not alone)


def order_of(limit: Limit, action: str | None) -> str:
    """Return what a guard is told, as far as a changed budget may change it."""
    return order_text(action, limit.cap.degrade, shadow=limit.budget.shadow)


def order_text(action: str | None, degrade: DegradeRule | Degrade | None, *, shadow: bool) -> str:
    """Return the action, with a digest of what degrading means."""
    order = f"{SHADOW if shadow else ''}{action}"
    if action == "degrade" and degrade is not None:
        order += " " + id_of(sorted(degrade.models.items()), degrade.max_output_tokens)[:12]
    return order


def unknown_model_order(budget: Budget, price_book: str) -> str:
    """Return what a guard is told about an unknown model; other prices may know it."""
    return f"{SHADOW if budget.shadow else ''}halt {price_book}"


def id_of(*parts: object) -> str:
    """Return the same id for the same parts, in every process."""
    return hashlib.sha256("\n".join(str(part) for part in parts).encode()).hexdigest()[:32]
