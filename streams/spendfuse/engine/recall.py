"""A fuse as its commands left it: from the ledger, where every command is, back to what the decision remembers."""

from spendfuse.engine.fuses import SHADOW, keep_fired, order_text, standing_of
from spendfuse.engine.policies import Limit, Policies
from spendfuse.engine.spend import RUN_KEY
from spendfuse.engine.state import Fired, Fuse
from spendfuse.engine.windows import FOREVER_US, SECOND_US, calendar_window
from spendfuse.wire.base import to_us
from spendfuse.wire.budget import BASIS_POINTS, UNKNOWN_MODEL_CAP
from spendfuse.wire.control import MANUAL_BUDGET, Command

GRACE_US_DEFAULT = 3_600 * SECOND_US


def recall(fuses: dict[str, Fuse], command: Command, policies: Policies, *, sent: bool) -> None:
    """Bring a scope's fuses to where a command left them; `sent`: not only decided, in shadow.

    A person's command has no fuse. One that is not newer than what is known changes nothing: a sequence never falls.
    What a threshold was is read from the budget in force; where that one is gone, the sequence alone still matters.
    """
    if command.budget == MANUAL_BUDGET:
        return
    fuse = fuses.setdefault(f"{command.budget}|{command.cap}", Fuse())
    if command.seq <= fuse.seq:
        return
    fuse.seq = command.seq
    issued_us = to_us(command.issued_at)
    if command.action == "resume":
        for name in standing_of(fuse, issued_us):
            del fuse.fired[name]
        return
    budget = policies.budgets.get(command.budget)
    grace_us = budget.grace_s * SECOND_US if budget else GRACE_US_DEFAULT
    if command.cap == UNKNOWN_MODEL_CAP:
        name, fired = _unknown_model(command, budget.timezone if budget else "UTC", sent=sent)
    else:
        limits = policies.of(command.scope).limits
        key = f"{command.budget}|{command.cap}"
        limit = next((limit for limit in limits if limit.key == key), None)
        name, fired = _window_key(command, limit), _fired(command, limit, sent=sent)
        # As when it fired: a command pushes out one of its key that would have stood longer.
        for other, standing in standing_of(fuse, issued_us).items():
            if other != name and standing.until_us > fired.until_us:
                del fuse.fired[other]
    keep_fired(fuse, name, fired, issued_us - grace_us)


def _until_us(command: Command) -> int:
    return FOREVER_US if command.expires_at is None else to_us(command.expires_at)


def _unknown_model(command: Command, zone: str, *, sent: bool) -> tuple[str, Fired]:
    until_us = _until_us(command)
    day = calendar_window("day", zone, to_us(command.cause.ts) if command.cause else until_us - 1)
    return day.key, Fired(BASIS_POINTS, until_us, f"{'' if sent else SHADOW}halt {command.price_book}")


def _window_key(command: Command, limit: Limit | None) -> str:
    window = command.window
    if window is None or window.kind == "run":
        return RUN_KEY
    if window.kind == "rolling":
        rolling_s = limit.cap.window.rolling_s if limit is not None else None
        return f"rolling@{rolling_s if rolling_s is not None else window.label}"
    start_us = 0 if window.start is None else to_us(window.start)
    return f"{window.kind}@{window.timezone}@{start_us // SECOND_US}"


def _fired(command: Command, limit: Limit | None, *, sent: bool) -> Fired:
    """Return what is remembered of a command: the highest threshold of its action that its numbers had reached."""
    order = order_text(command.action, command.degrade, shadow=not sent)
    measure = command.measure
    if measure is None:
        return Fired(BASIS_POINTS, _until_us(command), order)
    thresholds = limit.thresholds if limit is not None else ()
    reached = (
        each.fraction for each in thresholds if each.action == command.action and each.fraction <= measure.fraction
    )
    fallback = BASIS_POINTS if command.action == "halt" else min(measure.fraction, BASIS_POINTS)
    fraction = max(reached, default=fallback)
    return Fired(fraction, _until_us(command), order, held=measure.spend * BASIS_POINTS < fraction * measure.cap)
