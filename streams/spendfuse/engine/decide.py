"""Decisions: pure and total. A fuse trips when committed reaches its cap, once for each fraction and window.

Source of the rules: design.md section 5. More spend never rearms; a raised budget or a correction does
(`reconsider`), and a window's end does by itself, since commands expire.

Calls in flight count, so they may trip a fuse that spend alone would not, and what they tripped must not outlast them.
The rule: an order whose spend was below its line when it fired (`Fired.held`) is withdrawn as soon as committed is
below that line, because the calls used less than they held, were given up, or passed their deadlines. What committed
still calls for takes its place (degrade), else a resume; a warning is neither withdrawn nor said again. An order that
spend alone reached is never withdrawn this way: only a correction makes spend fall within a window, and `reconsider`
lifts what it frees.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from spendfuse.engine.crossings import Crossing, Held, crossing_of_key, crossings_of, wanted_of
from spendfuse.engine.fuses import (
    SEQ_KEPT_US,
    clear,
    fired_by,
    id_of,
    is_live,
    is_news,
    keep_fired,
    next_seq,
    order_of,
    remember,
    standing_of,
    unknown_model_order,
)
from spendfuse.engine.orders import NOBODY, CausedBy, Effects, cause_of, deliver, fire, lift
from spendfuse.engine.policies import Limit, ScopePolicy
from spendfuse.engine.sentences import instant
from spendfuse.engine.spend import NANOS, TOKENS, Spend
from spendfuse.engine.state import Fired, Fuse
from spendfuse.engine.windows import RUN_KEY, SECOND_US, calendar_window
from spendfuse.wire.base import from_us
from spendfuse.wire.budget import BASIS_POINTS, UNKNOWN_MODEL_CAP, Budget
from spendfuse.wire.control import Command

CORRECTED: Final = "spend was corrected"
BUDGET_CHANGED: Final = "the budget was changed"
CALLS_ENDED: Final = "calls in flight ended and left room"


def decide(
    scope: str,
    policy: ScopePolicy,
    spend: Spend,
    held: Held,
    fuses: dict[str, Fuse],
    cause: CausedBy,
    *,
    now_us: int,
    price_book: str,
    every_window: bool = False,
) -> Effects | None:
    """Return what crossing usage calls for, or None; `fuses` is brought up to date.

    `every_window` looks at all the windows kept, not only at the one of the cause: for sums that arrive together.
    """
    effects: Effects | None = None
    for limit in policy.limits:
        for crossing in crossings_of(limit, spend, held, cause.ts_us, now_us, every_window=every_window):
            if crossing.action is None:
                continue
            fuse = fuses.setdefault(limit.key, Fuse())
            if not is_news(crossing, fuse, now_us):
                continue
            effects = effects or Effects()
            fire(scope, crossing, fuse, cause, effects, now_us=now_us, price_book=price_book)
        known = fuses.get(limit.key)
        if known is not None and _outlasts(limit, spend, held, known, now_us):
            effects = effects or Effects()
            _release(scope, limit, spend, held, known, cause, effects, now_us=now_us, price_book=price_book)
    return effects


def stays_quiet(
    policy: ScopePolicy, spend: Spend, fuses: dict[str, Fuse], charges: Sequence[tuple[int, int, int]], now_us: int
) -> bool:
    """Say at little cost whether charges, added one by one, surely make `decide` return None each time.

    Charges are (event time in microseconds, nanos, tokens), and nothing is held. Nearly all reach no line of any cap
    that has not fired in their window. False when `decide` has to be asked: it may still return None.
    """
    if not policy.limits:
        return True
    more = (sum(charge[1] for charge in charges), sum(charge[2] for charge in charges))
    instants = (min(charges)[0], max(charges)[0])
    return all(_reaches_nothing(limit, spend, fuses.get(limit.key), more, instants, now_us) for limit in policy.limits)


def _reaches_nothing(
    limit: Limit, spend: Spend, fuse: Fuse | None, more: tuple[int, int], instants: tuple[int, int], now_us: int
) -> bool:
    """Say whether a cap's window with all that is added to it stays below every line that has not fired in it."""
    if fuse is not None and any(fired.held for fired in fuse.fired.values()):
        return False
    kind, rolling_s = limit.cap.window.kind, limit.cap.window.rolling_s
    reached = -1
    if rolling_s is not None:
        totals = spend.in_rolling(rolling_s, now_us)  # a line that has fired may have to be prolonged
    else:
        key = RUN_KEY
        if kind != "run":
            window = calendar_window(kind, limit.budget.timezone, instants[0])
            if instants[1] >= window.end_us:
                return False  # more windows than one
            key = window.key
        totals = spend.in_window(key)
        if fuse is not None and key in fuse.fired:
            reached = fuse.fired[key].fraction * limit.cap.amount
    index = TOKENS if limit.in_tokens else NANOS
    scaled = (totals[index] + more[index]) * BASIS_POINTS
    return all(line <= reached or scaled < line for line in limit.lines)


def _outlasts(limit: Limit, spend: Spend, held: Held, fuse: Fuse, now_us: int) -> bool:
    """Say whether the order a guard obeys stood on calls in flight, and these are no longer there."""
    if not any(fired.held for fired in fuse.fired.values()):
        return False
    standing = standing_of(fuse, now_us)
    key = max(standing, key=lambda name: standing[name][:2], default=None)
    if key is None or not standing[key].held or standing[key].order.endswith("warn"):
        return False
    crossing = crossing_of_key(key, limit, spend, held, now_us)
    return crossing.committed * BASIS_POINTS < standing[key].fraction * limit.cap.amount


def _release(
    scope: str,
    limit: Limit,
    spend: Spend,
    held: Held,
    fuse: Fuse,
    cause: CausedBy,
    effects: Effects,
    *,
    now_us: int,
    price_book: str,
) -> None:
    """Withdraw an order that outlasted the calls in flight it stood on; what they still call for takes its place."""
    standing = standing_of(fuse, now_us)
    told = max(standing.values(), key=lambda fired: fired[:2])
    wanted = wanted_of(crossings_of(limit, spend, held, now_us, now_us, every_window=True), now_us)
    clear(fuse, standing)
    if wanted is None or wanted.action == "warn":
        budget = limit.budget
        lift(
            scope, budget.id, budget.version, limit.cap.id, fuse, effects, now_us, CALLS_ENDED,
            shadow=not is_live(standing), seq_us=cause.ts_us,
        )  # fmt: skip
        if wanted is not None:
            remember(fuse, wanted, now_us)  # it was warned of on the way up
    elif told.order == order_of(limit, wanted.action) and wanted.fraction < told.fraction:
        remember(fuse, wanted, now_us)
    else:
        fire(scope, wanted, fuse, cause, effects, now_us=now_us, price_book=price_book)


def reconsider(
    scope: str,
    policy: ScopePolicy,
    spend: Spend,
    held: Held,
    fuses: dict[str, Fuse],
    *,
    now_us: int,
    price_book: str,
    denying: Mapping[str, Budget] | None = None,
    cause: CausedBy = NOBODY,
    reason: str = BUDGET_CHANGED,
) -> Effects | None:
    """Return what a changed budget or a correction calls for: new trips, and the lifting of what no longer holds.

    Of each cap at most one order is left standing. `denying` are the budgets that deny unknown models, by id; those
    of the scope itself when absent. A correction is the `cause`, with the time it was stated, and gives the `reason`.
    """
    effects = Effects()
    if cause is NOBODY:
        cause = NOBODY._replace(ts_us=now_us)
    if denying is None:
        denying = {budget.id: budget for budget in policy.deny_unknown}
    known = {limit.key for limit in policy.limits}
    for limit in policy.limits:
        crossings = crossings_of(limit, spend, held, now_us, now_us, every_window=True)
        _reconsider_limit(scope, limit, list(crossings), fuses, effects, cause, reason, now_us, price_book)
    for key in [key for key in fuses if key not in known]:
        fuse = fuses[key]
        budget_id, _, cap_id = key.partition("|")
        if cap_id == UNKNOWN_MODEL_CAP:
            budget = denying.get(budget_id)
            wanted = unknown_model_order(budget, price_book) if budget else None
            why = "prices were changed" if wanted else BUDGET_CHANGED
        else:
            budget, wanted, why = None, None, "the budget was withdrawn"
        standing = standing_of(fuse, now_us)
        if any(fired.order != wanted for fired in standing.values()):
            clear(fuse, standing)
            version = budget.version if budget else 0
            lift(scope, budget_id, version, cap_id, fuse, effects, now_us, why, shadow=not is_live(standing))
        if not standing_of(fuse, now_us) and fuse.seq < next_seq(0, now_us - SEQ_KEPT_US):
            del fuses[key]  # not earlier: the budget may come back, and its commands must not be older than these
    return effects or None


def _reconsider_limit(
    scope: str,
    limit: Limit,
    crossings: list[Crossing],
    fuses: dict[str, Fuse],
    effects: Effects,
    cause: CausedBy,
    reason: str,
    now_us: int,
    price_book: str,
) -> None:
    wanted = wanted_of(crossings, now_us)
    fuse = fuses.get(limit.key)
    standing = {} if fuse is None else standing_of(fuse, now_us)
    strictest = max(standing, key=lambda key: standing[key][:2], default=None)
    budget, cap_id = limit.budget, limit.cap.id
    if fuse is not None and strictest is not None:
        told = standing[strictest]
        same = fired_by(wanted)._replace(until_us=told.until_us, held=told.held) if wanted is not None else None
        if wanted is not None and strictest == wanted.window.key and told == same:
            if told.until_us != wanted.until_us:  # a rolling sum falls below a changed cap at another time
                fire(scope, wanted, fuse, cause, effects, now_us=now_us, price_book=price_book)
            return
        if wanted is None and told.held and told.order == order_of(limit, "warn"):
            return  # calls in flight alone were warned of, and are over: as `_outlasts` has it, nothing is taken back
        clear(fuse, standing)
        live = is_live(standing)
        # A warning stops nobody, so it lifts a stricter order without saying so: the resume says it.
        eases = wanted is None or (wanted.action == "warn" and not told.order.endswith("warn"))
        if eases or (budget.shadow and live):
            lift(
                scope, budget.id, budget.version, cap_id, fuse, effects, now_us, reason,
                shadow=not live, seq_us=cause.ts_us, cause=cause,
            )  # fmt: skip
        if wanted is not None and told.order == order_of(limit, wanted.action) and wanted.fraction < told.fraction:
            remember(fuse, wanted, now_us)  # the same order, at less of a raised cap: nothing new to say
            return
    if wanted is not None:
        fuse = fuses.setdefault(limit.key, Fuse())
        fire(scope, wanted, fuse, cause, effects, now_us=now_us, price_book=price_book)


def deny_unknown_model(
    scope: str,
    budgets: Sequence[Budget],
    fuses: dict[str, Fuse],
    cause: CausedBy,
    model: str,
    *,
    now_us: int,
    price_book: str,
) -> Effects | None:
    """Return the halt of an agent that used a model without a price, until the end of the budget's day."""
    effects: Effects | None = None
    for budget in budgets:
        window = calendar_window("day", budget.timezone, cause.ts_us)
        if window.end_us + budget.grace_s * SECOND_US <= now_us:
            continue
        fuse = fuses.setdefault(f"{budget.id}|{UNKNOWN_MODEL_CAP}", Fuse())
        # One halt is enough: the day's own, or that of a day that a clock ahead of ours has begun.
        if window.key in fuse.fired or any(fired.until_us > window.end_us for fired in fuse.fired.values()):
            continue
        effects = effects or Effects()
        order = unknown_model_order(budget, price_book)
        keep_fired(fuse, window.key, Fired(BASIS_POINTS, window.end_us, order), now_us - budget.grace_s * SECOND_US)
        fuse.seq = next_seq(fuse.seq, cause.ts_us)
        message = (
            f"{scope} used {model}, which has no price, and budget {budget.id} denies unknown models. "
            f"Add a price, or it resumes {instant(window.end_us, budget.timezone)}."
        )
        command = Command(
            id=id_of(scope, budget.id, UNKNOWN_MODEL_CAP, budget.version, window.key, "halt", fuse.seq),
            seq=fuse.seq,
            action="halt",
            scope=scope,
            budget=budget.id,
            cap=UNKNOWN_MODEL_CAP,
            budget_version=budget.version,
            issued_at=from_us(now_us),
            expires_at=from_us(window.end_us),
            cause=cause_of(cause),
            price_book=price_book,
            reason="unknown model",
            message=message[:512],
        )
        deliver(command, window, budget, effects, now_us)
    return effects
