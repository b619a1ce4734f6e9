"""What is left of each cap that halts, for the guards under it."""

from spendfuse.engine.crossings import Held
from spendfuse.engine.policies import Limit, ScopePolicy
from spendfuse.engine.spend import NANOS, TOKENS, Spend
from spendfuse.engine.windows import FOREVER_US, RUN_WINDOW, calendar_window, slot_of, slot_us
from spendfuse.wire.base import NANOS_MAX, from_us
from spendfuse.wire.remaining import Remaining


def speaks(limit: Limit) -> bool:
    """Say whether guards are told what is left of a cap: of one that halts, and is not only watched."""
    return limit.cap.halt and not limit.budget.shadow


def remaining_of(
    scope: str, policy: ScopePolicy, spend: Spend, held: Held, *, now_us: int, as_of_ms: int
) -> list[Remaining]:
    """Return what is left of the running window of each cap that guards are told of, in the order of the budgets."""
    return [_left(scope, limit, spend, held, now_us, as_of_ms) for limit in policy.limits if speaks(limit)]


def rolls_at(policy: ScopePolicy, spend: Spend, now_us: int) -> int | None:
    """Return when the sum of a rolling cap next changes by itself, in microseconds; None if none does."""
    lengths = (limit.cap.window.rolling_s for limit in policy.limits if speaks(limit))
    return min(
        (
            (slot_of(rolling_s, now_us) + 1) * slot_us(rolling_s)
            for rolling_s in lengths
            if rolling_s is not None and any(spend.in_rolling(rolling_s, now_us))
        ),
        default=None,
    )


def _left(scope: str, limit: Limit, spend: Spend, held: Held, now_us: int, as_of_ms: int) -> Remaining:
    window, cap = limit.cap.window, limit.cap
    end_us = FOREVER_US
    if window.rolling_s is not None:
        totals = spend.in_rolling(window.rolling_s, now_us)
    elif window.kind == "run":
        totals = spend.in_window(RUN_WINDOW.key)
    else:
        running = calendar_window(window.kind, limit.budget.timezone, now_us)
        totals, end_us = spend.in_window(running.key), running.end_us
    spent = totals[TOKENS] if limit.in_tokens else totals[NANOS]
    in_flight = (held.tokens if limit.in_tokens else held.nanos) if limit.budget.count_holds else 0
    return Remaining(
        scope=scope,
        budget=limit.budget.id,
        cap=cap.id,
        unit=cap.unit,
        amount=cap.amount,
        spend=min(spent, NANOS_MAX),
        committed=min(spent + in_flight, NANOS_MAX),
        at=from_us(now_us),
        as_of_ms=as_of_ms,
        resets_at=from_us(end_us) if end_us < FOREVER_US else None,
    )
