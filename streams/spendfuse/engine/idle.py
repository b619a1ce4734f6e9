"""When a scope's state may be forgotten: nothing it holds, protects or forbids can matter any more.

Its windows have closed, no call of it is in flight, no order of it stands, and its newest usage lies longer back than a
bound. The bound is longer than the age that the intake lets pass and the topics keep, so that no usage below a
forgotten watermark can come again, and no command decided later can have an older sequence than those before: both
follow event time. A run's window never closes, so there idleness alone counts.
"""

from collections.abc import Mapping
from typing import Final

from spendfuse.engine.fuses import SEQ_KEPT_US, next_seq, standing_of
from spendfuse.engine.policies import Policies
from spendfuse.engine.spend import Spend
from spendfuse.engine.state import Fuse, ScopeState, SharedState
from spendfuse.engine.windows import FOREVER_US, HOUR_US, RUN_KEY, SECOND_US, oldest_slot, window_of_key

DAY_US: Final = 86_400 * SECOND_US
REPLAY_US: Final = 14 * DAY_US
"""How long the topics may hold a usage after it came: their retention of 7 days, and a segment that is not full yet."""


def bound_us(idle_days: int, usage_age_max_s: int) -> int:
    """Return how long a scope must have been idle, in microseconds: the days asked for, or what is safe if longer."""
    return max(idle_days * DAY_US, usage_age_max_s * SECOND_US + REPLAY_US)


def scope_is_idle(scope: str, state: ScopeState, policies: Policies, now_us: int, idle_us: int) -> bool:
    """Say whether one partition's state of a scope may be forgotten."""
    return (
        _spend_is_idle(scope, state.spend, policies, now_us, idle_us)
        and not any(hold.deadline_us > now_us for hold in state.spend.holds.values())
        and _fuses_are_idle(state.fuses, now_us, idle_us)
    )


def shared_is_idle(scope: str, state: SharedState, policies: Policies, now_us: int, idle_us: int) -> bool:
    """Say whether the state of a shared scope may be forgotten: all its partitions' shares are idle."""
    return (
        all(_spend_is_idle(scope, part.spend, policies, now_us, idle_us) for part in state.parts.values())
        and state.held_until_us(now_us) is None
        and _fuses_are_idle(state.fuses, now_us, idle_us)
    )


def _spend_is_idle(scope: str, spend: Spend, policies: Policies, now_us: int, idle_us: int) -> bool:
    if spend.newest_us + idle_us > now_us:
        return False  # said without the policy: nearly all are in use
    closed_us = now_us - max(policies.of(scope).plan.grace_us, HOUR_US)
    return all(key == RUN_KEY or window_of_key(key).end_us <= closed_us for key in spend.windows) and not any(
        slot >= oldest_slot(rolling_s, now_us) for rolling_s, slots in spend.rolling.items() for slot in slots
    )


def _fuses_are_idle(fuses: Mapping[str, Fuse], now_us: int, idle_us: int) -> bool:
    """Say whether nothing ordered stands, and every later command's sequence is greater by its event time alone.

    What stands without an end (a run's halt) counts as long as its command lies in its topic.
    """
    long_ago = next_seq(0, max(now_us - idle_us, 0))
    forgotten = next_seq(0, max(now_us - max(idle_us, SEQ_KEPT_US), 0))
    for fuse in fuses.values():
        standing = standing_of(fuse, now_us).values()
        if any(fired.until_us < FOREVER_US for fired in standing):
            return False
        if fuse.seq >= (forgotten if standing else long_ago):
            return False
    return True
