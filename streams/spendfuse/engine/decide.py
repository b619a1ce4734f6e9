"""Decisions: pure and total. A fuse trips when committed reaches its cap, once for each fraction and window.

Source of the rules: design.md section 5. More spend never rearms; a raised budget or a correction does
(`reconsider`), and a window's end does by itself, since commands expire.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from spendfuse.engine.policies import Limit, ScopePolicy
from spendfuse.engine.sentences import amount, instant
from spendfuse.engine.spend import NANOS, TOKENS, Spend, Totals
from spendfuse.engine.state import Fired, Fuse
from spendfuse.engine.windows import (
    FOREVER_US,
    ROLLING_SLOTS,
    RUN_WINDOW,
    Window,
    calendar_window,
    oldest_slot,
    slot_us,
    window_of_key,
)
from spendfuse.wire.base import SAFE_INTEGER_MAX, from_us
from spendfuse.wire.budget import BASIS_POINTS, Budget
from spendfuse.wire.control import Action, Alert, Cause, Command, CommandWindow, Degrade, Measure

US_PER_MS: Final = 1_000
SEQ_PER_MS: Final = 1_000
UNKNOWN_MODEL_CAP: Final = "unknown-model"
SEVERITY: Final = {"warn": "warning", "degrade": "warning", "halt": "critical", "resume": "info"}
FIRED_MAX: Final = 64
"""Most windows whose firing one fuse remembers; the oldest are past their grace long before."""


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


@dataclass(slots=True)
class Effects:
    """What a decision asks the shell to do; `shadow` holds commands that are recorded and not sent."""

    commands: list[Command] = field(default_factory=list)
    shadow: list[Command] = field(default_factory=list)
    alerts: list[Alert] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Say whether there is anything to do."""
        return bool(self.commands or self.shadow or self.alerts)


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
            fired = fuse.fired.get(crossing.window.key)
            if fired is not None and crossing.fraction <= fired.fraction and not _prolongs(crossing, fired, now_us):
                continue
            effects = effects or Effects()
            _fire(scope, crossing, fuse, cause, effects, now_us=now_us, price_book=price_book)
    return effects


def reconsider(
    scope: str,
    policy: ScopePolicy,
    spend: Spend,
    held: Held,
    fuses: dict[str, Fuse],
    *,
    now_us: int,
    price_book: str,
) -> Effects | None:
    """Return what a changed budget or a correction calls for: new trips, and the lifting of what no longer holds."""
    effects = Effects()
    cause = CausedBy("", now_us, 0, 0)
    known = {limit.key: limit for limit in policy.limits}
    for limit in policy.limits:
        fuse = fuses.get(limit.key)
        for crossing in _crossings(limit, spend, held, now_us, now_us, every_window=True):
            fired = fuse.fired.get(crossing.window.key) if fuse else None
            stands = fired is not None and fired.until_us > now_us
            if crossing.action is not None and not stands:
                fuse = fuses.setdefault(limit.key, Fuse())
                _fire(scope, crossing, fuse, cause, effects, now_us=now_us, price_book=price_book)
            elif fuse is not None and fired is not None and stands and crossing.fraction != fired.fraction:
                if crossing.action is None:
                    del fuse.fired[crossing.window.key]
                    _lift(scope, limit.budget, limit.cap.id, fuse, effects, now_us, "the budget was changed")
                else:
                    _fire(scope, crossing, fuse, cause, effects, now_us=now_us, price_book=price_book)
    for key in [key for key in fuses if key not in known]:
        fuse = fuses[key]
        if any(fired.until_us > now_us for fired in fuse.fired.values()):
            budget_id, _, cap_id = key.partition("|")
            _lift(scope, None, cap_id, fuse, effects, now_us, "the budget was withdrawn", budget_id=budget_id)
        del fuses[key]
    return effects or None


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
        fuse = fuses.setdefault(f"{budget.id}|{UNKNOWN_MODEL_CAP}", Fuse())
        window = calendar_window("day", budget.timezone, cause.ts_us)
        if window.key in fuse.fired:
            continue
        effects = effects or Effects()
        _remember(fuse, window.key, Fired(BASIS_POINTS, window.end_us))
        fuse.seq = _next_seq(fuse.seq, cause.ts_us)
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
    elif every_window:
        prefix = f"{cap.window.kind}@{limit.budget.timezone}@"
        for key in [key for key in spend.windows if key.startswith(prefix)]:
            yield _crossing(limit, window_of_key(key), spend.windows[key], held, spend, now_us)
    else:
        window = calendar_window(cap.window.kind, limit.budget.timezone, ts_us)
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
        until_us = _falls_below(fraction * limit.cap.amount, spend, rolling_s, limit, now_us)
    return _Crossing(limit, window, spent, committed, fraction, action, until_us)


def _falls_below(scaled_line: int, spend: Spend, rolling_s: int, limit: Limit, now_us: int) -> int:
    """Return when a rolling sum will be below a line if nothing more is spent."""
    index = TOKENS if limit.in_tokens else NANOS
    length = slot_us(rolling_s)
    oldest = oldest_slot(rolling_s, now_us)
    slots = sorted((slot, totals[index]) for slot, totals in spend.rolling.get(rolling_s, {}).items())
    left = sum(value for slot, value in slots if slot >= oldest)
    for slot, value in slots:
        if slot >= oldest:
            left -= value
            if left * BASIS_POINTS < scaled_line:
                return (slot + ROLLING_SLOTS + 1) * length
    return now_us + rolling_s * 1_000_000


def _prolongs(crossing: _Crossing, fired: Fired, now_us: int) -> bool:
    """Say whether a rolling trip has run out, or lasts at least a slot longer than was said."""
    rolling_s = crossing.limit.cap.window.rolling_s
    if rolling_s is None:
        return False
    return fired.until_us <= now_us or crossing.until_us >= fired.until_us + slot_us(rolling_s)


def _fire(
    scope: str, crossing: _Crossing, fuse: Fuse, cause: CausedBy, effects: Effects, *, now_us: int, price_book: str
) -> None:
    limit, window = crossing.limit, crossing.window
    action = crossing.action
    if action is None:
        raise ValueError(f"{scope} {limit.key}: nothing was crossed, so nothing can fire")
    _remember(fuse, window.key, Fired(crossing.fraction, crossing.until_us))
    fuse.seq = _next_seq(fuse.seq, cause.ts_us)
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
        message=_sentence(scope, crossing)[:512],
    )
    _deliver(command, window, budget, effects, now_us)


def _deliver(command: Command, window: Window, budget: Budget, effects: Effects, now_us: int) -> None:
    if budget.shadow:
        effects.shadow.append(command)
        effects.alerts.append(_alert(command, now_us, shadow=True))
        return
    # A window that has ended is alerted, not commanded: its command would push out the one of the running window.
    if window.end_us > now_us:
        effects.commands.append(command)
    effects.alerts.append(_alert(command, now_us, shadow=False))


def _lift(
    scope: str,
    budget: Budget | None,
    cap_id: str,
    fuse: Fuse,
    effects: Effects,
    now_us: int,
    reason: str,
    *,
    budget_id: str = "",
) -> None:
    fuse.seq = _next_seq(fuse.seq, now_us)
    name = budget.id if budget else budget_id
    version = budget.version if budget else 0
    command = Command(
        id=_command_id(scope, name, cap_id, version, "", "resume", fuse.seq),
        seq=fuse.seq,
        action="resume",
        scope=scope,
        budget=name,
        cap=cap_id,
        budget_version=version,
        issued_at=from_us(now_us),
        reason=reason,
        message=f"{scope} may go on: {reason} ({name}, cap {cap_id})."[:512],
    )
    if budget is None or not budget.shadow:
        effects.commands.append(command)
    else:
        effects.shadow.append(command)
    effects.alerts.append(_alert(command, now_us, shadow=bool(budget and budget.shadow)))


def _remember(fuse: Fuse, key: str, fired: Fired) -> None:
    fuse.fired[key] = fired
    while len(fuse.fired) > FIRED_MAX:
        del fuse.fired[min(fuse.fired, key=lambda name: fuse.fired[name].until_us)]


def _next_seq(last: int, ts_us: int) -> int:
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
        spend=crossing.spend,
        committed=crossing.committed,
        fraction=crossing.committed * BASIS_POINTS // cap.amount,
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


def _sentence(scope: str, crossing: _Crossing) -> str:
    limit = crossing.limit
    cap, zone = limit.cap, limit.budget.timezone
    spent = amount(crossing.spend, cap.unit)
    in_flight = crossing.committed - crossing.spend
    if in_flight:
        spent += f", {amount(in_flight, cap.unit)} in flight"
    line = f"{cap.window.label} cap of {amount(cap.amount, cap.unit)}"
    if crossing.action == "halt":
        text = f"{scope} reached its {line} (spent {spent})."
        if crossing.until_us < FOREVER_US:
            text += f" Resumes {instant(crossing.until_us, zone)}."
        return text
    percent = f"{crossing.fraction // 100}" if crossing.fraction % 100 == 0 else f"{crossing.fraction / 100:.2f}"
    verb = "Use the cheaper model" if crossing.action == "degrade" else "It goes on"
    return f"{scope} used {percent} % of its {line} (spent {spent}). {verb}."
