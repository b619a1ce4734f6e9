"""Who goes on spending after a halt: a pure fold of commands and charges into alerts of kind `violation`.

A charge violates a halt when its call ended later than the halt's issue plus a grace: calls in flight at the halt may
end, and the halt must travel. One alert for each halted scope and agent at the first such charge, and another whenever
the sum has doubled. What is remembered lives in memory: a restarted worker counts from there, under the same ids.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final, NamedTuple

from spendfuse.engine.meter import Charged
from spendfuse.engine.sentences import money
from spendfuse.wire.base import NANOS_MAX, from_us, rfc3339, to_us
from spendfuse.wire.control import Alert, Command, Measure

HALTS_MAX: Final = 10_000
"""Most halts remembered; beyond it those that have ended go first, then the one that was issued first."""
VIOLATORS_MAX: Final = 10_000
"""Most (halted scope, agent) counted; beyond it the one that began first is forgotten."""
NEVER_US: Final = 2**62
ID_CHARS: Final = 32
MESSAGE_CHARS_MAX: Final = 512


@dataclass(slots=True)
class Halt:
    """One halt of a cap or of a person: from its issue until it expires or is lifted, in microseconds."""

    command: Command
    from_us: int
    until_us: int


class Halts:
    """The halts of all scopes, from the genuine commands in any order; those that ended are kept for late usage."""

    def __init__(self, halts_max: int = HALTS_MAX) -> None:
        self._halts_max = halts_max
        self._seqs: dict[str, int] = {}
        self._by_scope: dict[str, dict[str, Halt]] = {}
        self._by_age: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self._by_scope)

    def __len__(self) -> int:
        return len(self._by_age)

    def take(self, command: Command) -> None:
        """Take in a command that is known to be genuine; a warning or an old one changes nothing."""
        key = command.key
        if command.action == "warn" or command.seq <= self._seqs.get(key, -1):
            return
        issued_us = to_us(command.issued_at)
        before = self._by_scope.get(command.scope, {}).get(key)
        if command.action != "halt":
            if before is not None:
                self._seqs[key] = command.seq
                before.until_us = min(before.until_us, issued_us)
            return
        until_us = to_us(command.expires_at) if command.expires_at is not None else NEVER_US
        prolonged = before is not None and before.until_us >= issued_us
        self._seqs[key] = command.seq
        self._by_scope.setdefault(command.scope, {})[key] = Halt(
            command, before.from_us if before is not None and prolonged else issued_us, until_us
        )
        self._by_age[key] = command.scope
        if len(self._by_age) > self._halts_max:
            self._forget_one(issued_us)

    def over(self, scopes: Sequence[str], ts_us: int, grace_us: int) -> Halt | None:
        """Return the halt that held longest over any of the scopes at an event time, its grace spent; None if none."""
        found = [
            halt
            for scope in scopes
            for halt in self._by_scope.get(scope, {}).values()
            if halt.from_us + grace_us < ts_us < halt.until_us
        ]
        return min(found, key=lambda halt: (halt.from_us, halt.command.key), default=None)

    def _forget_one(self, now_us: int) -> None:
        ended = (key for key, scope in self._by_age.items() if self._by_scope[scope][key].until_us <= now_us)
        key = next(ended, next(iter(self._by_age)))
        scope = self._by_age.pop(key)
        del self._seqs[key], self._by_scope[scope][key]
        if not self._by_scope[scope]:
            del self._by_scope[scope]


class _Violation(NamedTuple):
    """Whose halt, who spent, and since when the halt holds."""

    scope: str
    agent: str
    from_us: int


@dataclass(slots=True)
class _Running:
    """What an agent has spent after a halt so far, and at which sums the next alert is due."""

    nanos: int = 0
    tokens: int = 0
    calls: int = 0
    alerts: int = 0
    nanos_due: int = 0
    tokens_due: int = 0
    marks: dict[int, int] = field(default_factory=dict)


class Violations:
    """Charges in, alerts out."""

    def __init__(self, halts: Halts, grace_us: int, violators_max: int = VIOLATORS_MAX) -> None:
        """`grace_us`: how long after a halt's issue a call may still end, in microseconds of event time."""
        self._halts = halts
        self._grace_us = grace_us
        self._violators_max = violators_max
        self._running: dict[_Violation, _Running] = {}

    def on_charges(self, charged: Iterable[Charged], now_us: int) -> list[Alert]:
        """Return the alerts that follow from charges; what is a duplicate, or comes again, changes nothing."""
        if not self._halts:
            return []
        return [alert for each in charged if (alert := self._on_charge(each, now_us)) is not None]

    def _on_charge(self, charged: Charged, now_us: int) -> Alert | None:
        call = charged.call
        if charged.kind != "charge":
            return None
        agent = call.who.agent
        halt = self._halts.over((agent, *call.who.shared), call.ts_us, self._grace_us)
        if halt is None:
            return None
        violation = _Violation(halt.command.scope, agent, halt.from_us)
        running = self._of(violation)
        if call.position <= running.marks.get(call.partition, -1):
            return None
        running.marks[call.partition] = call.position
        running.nanos = min(running.nanos + charged.charge.cost_nanos, NANOS_MAX)
        running.tokens += call.tokens
        running.calls += 1
        if running.alerts and running.nanos < running.nanos_due and running.tokens < running.tokens_due:
            return None
        running.alerts += 1
        running.nanos_due, running.tokens_due = max(2 * running.nanos, 1), max(2 * running.tokens, 1)
        return self._alert(violation, running, halt.command, call.used.id, charged.charge.currency, now_us)

    def _of(self, violation: _Violation) -> _Running:
        running = self._running.get(violation)
        if running is None:
            if len(self._running) >= self._violators_max:
                del self._running[next(iter(self._running))]
            running = self._running[violation] = _Running()
        return running

    def _alert(
        self, violation: _Violation, running: _Running, halt: Command, usage_id: str, currency: str, now_us: int
    ) -> Alert:
        spent = f"{money(running.nanos, currency)} and {running.tokens:,} tokens in {running.calls:,} calls"
        whom = "it" if violation.scope == violation.agent else violation.scope
        message = (
            f"{violation.agent} spent {spent} that ended more than {self._grace_us // 1_000_000} s after {whom} was "
            f"halted at {rfc3339(from_us(violation.from_us))} by {halt.by} ({halt.budget}, cap {halt.cap}). "
            "Its guard does not obey, or it has none: stop its process."
        )
        name = f"violation|{violation.scope}|{violation.agent}|{violation.from_us}|{running.alerts}"
        return Alert(
            id=sha256(name.encode()).hexdigest()[:ID_CHARS],
            ts=from_us(now_us),
            kind="violation",
            severity="critical",
            scope=violation.agent,
            budget=halt.budget,
            cap=halt.cap,
            # After a halt nothing may be spent: the cap is 0, and the whole sum is over it.
            measure=Measure(unit=f"nano-{currency}", cap=0, spend=running.nanos, committed=running.nanos, fraction=0),
            usage_id=usage_id,
            message=message[:MESSAGE_CHARS_MAX],
        )
