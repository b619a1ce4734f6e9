"""What a decision says: commands, with the numbers that caused them and a sentence for people, and alerts."""

from dataclasses import dataclass, field
from typing import Final, NamedTuple

from spendfuse.engine.crossings import Crossing
from spendfuse.engine.fuses import id_of, next_seq, remember
from spendfuse.engine.sentences import amount, instant
from spendfuse.engine.state import Fuse
from spendfuse.engine.windows import FOREVER_US, Window
from spendfuse.wire.base import NANOS_MAX, from_us
from spendfuse.wire.budget import BASIS_POINTS, Budget
from spendfuse.wire.control import Alert, Cause, Command, CommandWindow, Degrade, Measure

SEVERITY: Final = {"warn": "warning", "degrade": "warning", "halt": "critical", "resume": "info"}


class CausedBy(NamedTuple):
    """The usage that is being decided on: its id, event time, and place in `usage.v1`."""

    usage_id: str
    ts_us: int
    partition: int
    offset: int
    produced_at_ms: int = -1


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


def fire(
    scope: str, crossing: Crossing, fuse: Fuse, cause: CausedBy, effects: Effects, *, now_us: int, price_book: str
) -> None:
    """Order what a crossing calls for and remember it; one that only prolongs a warning says nothing."""
    limit, window = crossing.limit, crossing.window
    action = crossing.action
    if action is None:
        raise ValueError(f"{scope} {limit.key}: nothing was crossed, so nothing can fire")
    known = fuse.fired.get(window.key)
    prolongs = known is not None and known.until_us > now_us and known.fraction == crossing.fraction
    remember(fuse, crossing, now_us)
    if prolongs and action == "warn":
        return  # it stands a slot longer; one warning is enough
    fuse.seq = next_seq(fuse.seq, cause.ts_us)
    budget, cap = limit.budget, limit.cap
    degrade = None
    if action == "degrade" and cap.degrade is not None:
        degrade = Degrade(models=cap.degrade.models, max_output_tokens=cap.degrade.max_output_tokens)
    command = Command(
        id=id_of(scope, budget.id, cap.id, budget.version, window.key, action, fuse.seq),
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
        cause=cause_of(cause),
        degrade=degrade,
        price_book=price_book,
        message=_sentence(scope, crossing, now_us)[:512],
    )
    deliver(command, window, budget, effects, now_us, quiet=prolongs)


def deliver(
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


def lift(
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
    """Resume: what a cap ordered is withdrawn."""
    fuse.seq = next_seq(fuse.seq, now_us if seq_us is None else seq_us)
    command = Command(
        id=id_of(scope, budget_id, cap_id, version, "", "resume", fuse.seq),
        seq=fuse.seq,
        action="resume",
        scope=scope,
        budget=budget_id,
        cap=cap_id,
        budget_version=version,
        issued_at=from_us(now_us),
        cause=cause_of(cause),
        reason=reason,
        message=f"{scope} may go on: {reason} ({budget_id}, cap {cap_id})."[:512],
    )
    (effects.shadow if shadow else effects.commands).append(command)
    effects.alerts.append(_alert(command, now_us, shadow=shadow))


def cause_of(cause: CausedBy) -> Cause | None:
    """Return a cause as it is written in a command; None for a changed budget."""
    if not cause.usage_id:
        return None
    return Cause(
        usage_id=cause.usage_id,
        ts=from_us(cause.ts_us),
        partition=cause.partition,
        offset=cause.offset,
        produced_at_ms=cause.produced_at_ms,
    )


def _measure(crossing: Crossing) -> Measure:
    cap = crossing.limit.cap
    return Measure(
        unit=cap.unit,
        cap=cap.amount,
        spend=min(crossing.spend, NANOS_MAX),
        committed=min(crossing.committed, NANOS_MAX),
        fraction=min(crossing.committed * BASIS_POINTS // cap.amount, NANOS_MAX),
    )


def alert_id(command_id: str) -> str:
    """Return the id of the alert about a command."""
    return id_of("alert", command_id)


def _alert(command: Command, now_us: int, *, shadow: bool) -> Alert:
    return Alert(
        id=alert_id(command.id),
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


def _sentence(scope: str, crossing: Crossing, now_us: int) -> str:
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
