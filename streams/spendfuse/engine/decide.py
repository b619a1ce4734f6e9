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

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from spendfuse.engine.policies import Limit, ScopePolicy
from spendfuse.engine.sentences import amount, instant
from spendfuse.engine.spend import NANOS, TOKENS, Spend, Totals
from spendfuse.engine.state import Fired, Fuse
from spendfuse.engine.windows import (
    FOREVER_US,
    ROLLING_SLOTS,
    RUN_KEY,
    RUN_WINDOW,
    SECOND_US,
    Window,
    calendar_window,
    oldest_slot,
    slot_of,
    slot_us,
    window_of_key,
)
from spendfuse.wire.base import NANOS_MAX, SAFE_INTEGER_MAX, from_us
from spendfuse.wire.budget import BASIS_POINTS, UNKNOWN_MODEL_CAP, Budget, DegradeRule
from spendfuse.wire.control import Action, Alert, Cause, Command, CommandWindow, Degrade, Measure

US_PER_MS: Final = 1_000
SEQ_PER_MS: Final = 1_000
SEVERITY: Final = {"warn": "warning", "degrade": "warning", "halt": "critical", "resume": "info"}
FIRED_MAX: Final = 256
"""Most windows whose firing one fuse remembers: more than the hours of the longest grace (7 days)."""
SEQ_KEPT_US: Final = 45 * 86_400_000_000
"""How long a withdrawn budget's sequence is remembered: as long as its commands lie in their topic."""
SHADOW: Final = "shadow "
CORRECTED: Final = "spend was corrected"
BUDGET_CHANGED: Final = "the budget was changed"
CALLS_ENDED: Final = "calls in flight ended and left room"


class CausedBy(NamedTuple):
    """The usage that is being decided on: its id, event time, and place in `usage.v1`."""

    usage_id: str
    ts_us: int
    partition: int
    offset: int
    produced_at_ms: int = -1


class Held(NamedTuple):
    """The calls in flight of a scope: nano-units and tokens."""

    nanos: int = 0
    tokens: int = 0


NOTHING_HELD: Final = Held()
NOBODY: Final = CausedBy("", 0, 0, 0)
"""The cause of what a changed budget leads to."""


@dataclass(slots=True)
class Effects:
    """What a decision asks the shell to do; `shadow` holds commands that are recorded and not sent."""

    commands: list[Command] = field(default_factory=list)
    shadow: list[Command] = field(default_factory=list)
    alerts: list[Alert] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Say whether there is anything to do."""
        return bool(self.commands or self.shadow or self.alerts)

    def with_more(self, more: "Effects") -> "Effects":
        """Return these effects and then others."""
        return Effects(self.commands + more.commands, self.shadow + more.shadow, self.alerts + more.alerts)


class _Crossing(NamedTuple):
    """One cap in one window: what was spent, and the highest threshold reached."""

    limit: Limit
    window: Window
    spend: int
    committed: int
    fraction: int
    action: Action | None
    until_us: int


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
        for crossing in _crossings(limit, spend, held, cause.ts_us, now_us, every_window=every_window):
            if crossing.action is None:
                continue
            fuse = fuses.setdefault(limit.key, Fuse())
            if not _is_news(crossing, fuse, now_us):
                continue
            effects = effects or Effects()
            _fire(scope, crossing, fuse, cause, effects, now_us=now_us, price_book=price_book)
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
    crossing = _crossing_of_key(key, limit, spend, held, now_us)
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
    wanted = _wanted(_crossings(limit, spend, held, now_us, now_us, every_window=True), now_us)
    _clear(fuse, standing)
    if wanted is None or wanted.action == "warn":
        budget = limit.budget
        _lift(
            scope, budget.id, budget.version, limit.cap.id, fuse, effects, now_us, CALLS_ENDED,
            shadow=not _is_live(standing), seq_us=cause.ts_us,
        )  # fmt: skip
        if wanted is not None:
            _remember(fuse, wanted, now_us)  # it was warned of on the way up
    elif told.order == order_of(limit, wanted.action) and wanted.fraction < told.fraction:
        _remember(fuse, wanted, now_us)
    else:
        _fire(scope, wanted, fuse, cause, effects, now_us=now_us, price_book=price_book)


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
        crossings = _crossings(limit, spend, held, now_us, now_us, every_window=True)
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
            _clear(fuse, standing)
            version = budget.version if budget else 0
            _lift(scope, budget_id, version, cap_id, fuse, effects, now_us, why, shadow=not _is_live(standing))
        if not standing_of(fuse, now_us) and fuse.seq < next_seq(0, now_us - SEQ_KEPT_US):
            del fuses[key]  # not earlier: the budget may come back, and its commands must not be older than these
    return effects or None


def _reconsider_limit(
    scope: str,
    limit: Limit,
    crossings: list["_Crossing"],
    fuses: dict[str, Fuse],
    effects: Effects,
    cause: CausedBy,
    reason: str,
    now_us: int,
    price_book: str,
) -> None:
    wanted = _wanted(crossings, now_us)
    fuse = fuses.get(limit.key)
    standing = {} if fuse is None else standing_of(fuse, now_us)
    strictest = max(standing, key=lambda key: standing[key][:2], default=None)
    budget, cap_id = limit.budget, limit.cap.id
    if fuse is not None and strictest is not None:
        told = standing[strictest]
        same = _fired(wanted)._replace(until_us=told.until_us, held=told.held) if wanted is not None else None
        if wanted is not None and strictest == wanted.window.key and told == same:
            if told.until_us != wanted.until_us:  # a rolling sum falls below a changed cap at another time
                _fire(scope, wanted, fuse, cause, effects, now_us=now_us, price_book=price_book)
            return
        _clear(fuse, standing)
        live = _is_live(standing)
        # A warning stops nobody, so it lifts a stricter order without saying so: the resume says it.
        eases = wanted is None or (wanted.action == "warn" and not told.order.endswith("warn"))
        if eases or (budget.shadow and live):
            _lift(
                scope, budget.id, budget.version, cap_id, fuse, effects, now_us, reason,
                shadow=not live, seq_us=cause.ts_us, cause=cause,
            )  # fmt: skip
        if wanted is not None and told.order == order_of(limit, wanted.action) and wanted.fraction < told.fraction:
            _remember(fuse, wanted, now_us)  # the same order, at less of a raised cap: nothing new to say
            return
    if wanted is not None:
        fuse = fuses.setdefault(limit.key, Fuse())
        _fire(scope, wanted, fuse, cause, effects, now_us=now_us, price_book=price_book)


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
            id=_command_id(scope, budget.id, UNKNOWN_MODEL_CAP, budget.version, window.key, "halt", fuse.seq),
            seq=fuse.seq,
            action="halt",
            scope=scope,
            budget=budget.id,
            cap=UNKNOWN_MODEL_CAP,
            budget_version=budget.version,
            issued_at=from_us(now_us),
            expires_at=from_us(window.end_us),
            cause=_cause(cause),
            price_book=price_book,
            reason="unknown model",
            message=message[:512],
        )
        _deliver(command, window, budget, effects, now_us)
    return effects


def _wanted(crossings: Iterable[_Crossing], now_us: int) -> _Crossing | None:
    """Return the strictest of what the windows that have not ended call for."""
    running = [crossing for crossing in crossings if crossing.action is not None and crossing.window.end_us > now_us]
    return max(running, key=lambda crossing: (crossing.fraction, crossing.until_us), default=None)


def _crossing_of_key(key: str, limit: Limit, spend: Spend, held: Held, now_us: int) -> _Crossing:
    rolling_s = limit.cap.window.rolling_s
    if rolling_s is not None:
        return _crossing(
            limit, Window(key, now_us, FOREVER_US), spend.in_rolling(rolling_s, now_us), held, spend, now_us
        )
    return _crossing(limit, window_of_key(key), spend.in_window(key), held, spend, now_us)


def _crossings(
    limit: Limit, spend: Spend, held: Held, ts_us: int, now_us: int, *, every_window: bool
) -> Iterator[_Crossing]:
    cap = limit.cap
    if cap.window.rolling_s is not None:
        key = f"rolling@{cap.window.rolling_s}"
        totals = spend.in_rolling(cap.window.rolling_s, now_us)
        yield _crossing(limit, Window(key, now_us, FOREVER_US), totals, held, spend, now_us)
    elif cap.window.kind == "run":
        yield _crossing(limit, RUN_WINDOW, spend.in_window(RUN_WINDOW.key), held, spend, now_us)
    else:
        kind, zone = cap.window.kind, limit.budget.timezone
        running = calendar_window(kind, zone, now_us)
        if every_window:
            windows = [window_of_key(key) for key in spend.windows if key.startswith(f"{kind}@{zone}@")]
            if running.key not in spend.windows:
                windows.append(running)  # nothing charged yet, and calls in flight count
        else:
            windows = [calendar_window(kind, zone, ts_us)]
            if held != NOTHING_HELD and windows[0] != running:
                windows.append(running)
        closed_us = now_us - limit.budget.grace_s * SECOND_US
        for window in windows:
            if window.end_us > closed_us:
                yield _crossing(limit, window, spend.in_window(window.key), held, spend, now_us)


def _crossing(limit: Limit, window: Window, totals: Totals, held: Held, spend: Spend, now_us: int) -> _Crossing:
    spent = totals[TOKENS] if limit.in_tokens else totals[NANOS]
    committed = spent
    if limit.budget.count_holds and window.end_us > now_us:
        committed += held.tokens if limit.in_tokens else held.nanos
    scaled = committed * BASIS_POINTS
    fraction, action = 0, None
    for threshold in limit.thresholds:
        if scaled < threshold.fraction * limit.cap.amount:
            break
        fraction, action = threshold.fraction, threshold.action
    until_us = window.end_us
    rolling_s = limit.cap.window.rolling_s
    if rolling_s is not None and action is not None:
        until_us = _falls_below(fraction * limit.cap.amount, spend, committed - spent, limit, now_us)
    return _Crossing(limit, window, spent, committed, fraction, action, until_us)


def _falls_below(scaled_line: int, spend: Spend, in_flight: int, limit: Limit, now_us: int) -> int:
    """Return when a rolling sum will be below a line if nothing more is spent; calls in flight count as spent now."""
    rolling_s = limit.cap.window.rolling_s or 0
    index = TOKENS if limit.in_tokens else NANOS
    oldest = oldest_slot(rolling_s, now_us)
    slots = {slot: totals[index] for slot, totals in spend.rolling.get(rolling_s, {}).items() if slot >= oldest}
    running = slot_of(rolling_s, now_us)
    slots[running] = slots.get(running, 0) + in_flight
    left = sum(slots.values())
    last = running
    for slot in sorted(slots):
        left -= slots[slot]
        if left * BASIS_POINTS < scaled_line:
            last = slot
            break
    return (last + ROLLING_SLOTS + 1) * slot_us(rolling_s)


def _is_news(crossing: _Crossing, fuse: Fuse, now_us: int) -> bool:
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


def _fire(
    scope: str, crossing: _Crossing, fuse: Fuse, cause: CausedBy, effects: Effects, *, now_us: int, price_book: str
) -> None:
    limit, window = crossing.limit, crossing.window
    action = crossing.action
    if action is None:
        raise ValueError(f"{scope} {limit.key}: nothing was crossed, so nothing can fire")
    known = fuse.fired.get(window.key)
    prolongs = known is not None and known.until_us > now_us and known.fraction == crossing.fraction
    _remember(fuse, crossing, now_us)
    if prolongs and action == "warn":
        return  # it stands a slot longer; one warning is enough
    fuse.seq = next_seq(fuse.seq, cause.ts_us)
    budget, cap = limit.budget, limit.cap
    degrade = None
    if action == "degrade" and cap.degrade is not None:
        degrade = Degrade(models=cap.degrade.models, max_output_tokens=cap.degrade.max_output_tokens)
    command = Command(
        id=_command_id(scope, budget.id, cap.id, budget.version, window.key, action, fuse.seq),
        seq=fuse.seq,
        action=action,
        scope=scope,
        budget=budget.id,
        cap=cap.id,
        budget_version=budget.version,
        issued_at=from_us(now_us),
        expires_at=from_us(crossing.until_us) if crossing.until_us < FOREVER_US else None,
        window=CommandWindow(
            kind=cap.window.kind,
            label=cap.window.label,
            timezone=budget.timezone,
            start=from_us(window.start_us) if window.end_us < FOREVER_US else None,
            end=from_us(window.end_us) if window.end_us < FOREVER_US else None,
        ),
        measure=_measure(crossing),
        cause=_cause(cause),
        degrade=degrade,
        price_book=price_book,
        message=_sentence(scope, crossing, now_us)[:512],
    )
    _deliver(command, window, budget, effects, now_us, quiet=prolongs)


def _deliver(
    command: Command, window: Window, budget: Budget, effects: Effects, now_us: int, *, quiet: bool = False
) -> None:
    """Send or record a command, and alert unless it only prolongs one that was alerted."""
    if budget.shadow:
        effects.shadow.append(command)
    elif window.end_us > now_us:
        # A window that has ended is alerted, not commanded: its command would push out the one of the running window.
        effects.commands.append(command)
    if not quiet:
        effects.alerts.append(_alert(command, now_us, shadow=budget.shadow))


def _lift(
    scope: str,
    budget_id: str,
    version: int,
    cap_id: str,
    fuse: Fuse,
    effects: Effects,
    now_us: int,
    reason: str,
    *,
    shadow: bool,
    seq_us: int | None = None,
    cause: CausedBy = NOBODY,
) -> None:
    fuse.seq = next_seq(fuse.seq, now_us if seq_us is None else seq_us)
    command = Command(
        id=_command_id(scope, budget_id, cap_id, version, "", "resume", fuse.seq),
        seq=fuse.seq,
        action="resume",
        scope=scope,
        budget=budget_id,
        cap=cap_id,
        budget_version=version,
        issued_at=from_us(now_us),
        cause=_cause(cause),
        reason=reason,
        message=f"{scope} may go on: {reason} ({budget_id}, cap {cap_id})."[:512],
    )
    (effects.shadow if shadow else effects.commands).append(command)
    effects.alerts.append(_alert(command, now_us, shadow=shadow))


def standing_of(fuse: Fuse, now_us: int) -> dict[str, Fired]:
    """Return what was ordered and has not run out, by window key."""
    return {key: fired for key, fired in fuse.fired.items() if fired.until_us > now_us}


def _is_live(standing: Mapping[str, Fired]) -> bool:
    """Say whether any of it was sent, and not only recorded."""
    return any(not fired.order.startswith(SHADOW) for fired in standing.values())


def _clear(fuse: Fuse, standing: Mapping[str, Fired]) -> None:
    for key in standing:
        del fuse.fired[key]


def order_of(limit: Limit, action: str | None) -> str:
    """Return what a guard is told, as far as a changed budget may change it."""
    return order_text(action, limit.cap.degrade, shadow=limit.budget.shadow)


def order_text(action: str | None, degrade: DegradeRule | Degrade | None, *, shadow: bool) -> str:
    """Return the action, with a digest of what degrading means."""
    order = f"{SHADOW if shadow else ''}{action}"
    if action == "degrade" and degrade is not None:
        order += " " + _command_id(sorted(degrade.models.items()), degrade.max_output_tokens)[:12]
    return order


def unknown_model_order(budget: Budget, price_book: str) -> str:
    """Return what a guard is told about an unknown model; other prices may know it."""
    return f"{SHADOW if budget.shadow else ''}halt {price_book}"


def _fired(crossing: _Crossing) -> Fired:
    alone = crossing.spend * BASIS_POINTS >= crossing.fraction * crossing.limit.cap.amount
    return Fired(crossing.fraction, crossing.until_us, order_of(crossing.limit, crossing.action), held=not alone)


def _remember(fuse: Fuse, crossing: _Crossing, now_us: int) -> None:
    """Note that a crossing fired; what its command pushes out is forgotten, so that the next usage says it again."""
    if crossing.window.end_us > now_us:
        for key, other in standing_of(fuse, now_us).items():
            if key != crossing.window.key and other.until_us > crossing.until_us:
                del fuse.fired[key]
    keep_fired(fuse, crossing.window.key, _fired(crossing), now_us - crossing.limit.budget.grace_s * SECOND_US)


def keep_fired(fuse: Fuse, key: str, fired: Fired, closed_us: int) -> None:
    """Remember what fired in a window; what had run out by an instant is forgotten, and the oldest beyond the most."""
    for old in [name for name, other in fuse.fired.items() if other.until_us <= closed_us]:
        del fuse.fired[old]
    fuse.fired[key] = fired
    while len(fuse.fired) > FIRED_MAX:
        del fuse.fired[min(fuse.fired, key=lambda name: fuse.fired[name].until_us)]


def next_seq(last: int, ts_us: int) -> int:
    """Return a growing sequence from event time, so that it is the same on a replay and survives a lost state."""
    return min(max(last + 1, ts_us // US_PER_MS * SEQ_PER_MS), SAFE_INTEGER_MAX)


def _command_id(*parts: object) -> str:
    return hashlib.sha256("\n".join(str(part) for part in parts).encode()).hexdigest()[:32]


def _cause(cause: CausedBy) -> Cause | None:
    if not cause.usage_id:
        return None
    return Cause(
        usage_id=cause.usage_id,
        ts=from_us(cause.ts_us),
        partition=cause.partition,
        offset=cause.offset,
        produced_at_ms=cause.produced_at_ms,
    )


def _measure(crossing: _Crossing) -> Measure:
    cap = crossing.limit.cap
    return Measure(
        unit=cap.unit,
        cap=cap.amount,
        spend=min(crossing.spend, NANOS_MAX),
        committed=min(crossing.committed, NANOS_MAX),
        fraction=min(crossing.committed * BASIS_POINTS // cap.amount, NANOS_MAX),
    )


def _alert(command: Command, now_us: int, *, shadow: bool) -> Alert:
    return Alert(
        id=_command_id("alert", command.id),
        ts=from_us(now_us),
        kind="shadow" if shadow else command.action,
        severity="info" if shadow else SEVERITY[command.action],  # type: ignore[arg-type]  # the table's values are the literals
        scope=command.scope,
        budget=command.budget,
        cap=command.cap,
        measure=command.measure,
        usage_id=command.cause.usage_id if command.cause else None,
        message=("Shadow, not sent: " + command.message if shadow else command.message)[:512],
    )


def _sentence(scope: str, crossing: _Crossing, now_us: int) -> str:
    limit = crossing.limit
    cap, zone = limit.cap, limit.budget.timezone
    spent = amount(crossing.spend, cap.unit)
    in_flight = crossing.committed - crossing.spend
    if in_flight:
        spent += f", {amount(in_flight, cap.unit)} in flight"
    line = f"{cap.window.label} cap of {amount(cap.amount, cap.unit)}"
    if crossing.action == "halt":
        text = f"{scope} reached its {line} (spent {spent})."
        if crossing.until_us <= now_us:
            text += f" Known only after that window had ended, {instant(crossing.until_us, zone)}: nothing is stopped."
        elif crossing.until_us < FOREVER_US:
            text += f" Resumes {instant(crossing.until_us, zone)}."
        return text
    percent = f"{crossing.fraction // 100}" if crossing.fraction % 100 == 0 else f"{crossing.fraction / 100:.2f}"
    verb = "Use the cheaper model" if crossing.action == "degrade" else "It goes on"
    return f"{scope} reached {percent} % of its {line} (spent {spent}). {verb}."
