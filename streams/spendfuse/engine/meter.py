"""The meter: one packed partition's usage, folded into its scopes, and the agents' caps checked at once.

Every key has its own watermark: a usage at or below it changes nothing there, so a replay is harmless whichever of
the keys had become durable (design.md section 6).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from spendfuse.engine.decide import NOBODY, CausedBy, Effects, Held, decide, deny_unknown_model, reconsider
from spendfuse.engine.due import Due
from spendfuse.engine.ids import SeenIds, usage_digest
from spendfuse.engine.policies import Policies
from spendfuse.engine.prices import Charge, PriceBook
from spendfuse.engine.remaining import remaining_of, rolls_at
from spendfuse.engine.spend import Hold
from spendfuse.engine.state import NOTED_MAX, ScopeState
from spendfuse.engine.windows import calendar_window
from spendfuse.wire.base import from_us, to_us, trusted
from spendfuse.wire.control import Alert, Cause
from spendfuse.wire.ledger import Charge as WireCharge
from spendfuse.wire.ledger import LedgerEntry
from spendfuse.wire.packed import Origin, PackedUsage
from spendfuse.wire.remaining import Remaining
from spendfuse.wire.rollup import Rollup
from spendfuse.wire.scopes import agent_scope, scope_kind, shared_scopes
from spendfuse.wire.topics import USAGE
from spendfuse.wire.usage import Usage

HOLD_US_DEFAULT: Final = 600_000_000
"""How long a call in flight without a deadline is held."""
HOLD_US_MAX: Final = 86_400_000_000

Load = Callable[[str], ScopeState | None]


@dataclass(slots=True)
class Outcome:
    """What one packed message led to: entries for the ledger, effects, and the scopes whose state changed."""

    entries: list[LedgerEntry] = field(default_factory=list)
    effects: Effects = field(default_factory=Effects)
    touched: set[str] = field(default_factory=set)
    replays: int = 0
    duplicates: int = 0


@dataclass(slots=True)
class _Step:
    """One usage on its way through the scopes."""

    usage: Usage
    origin: Origin
    charge: Charge
    cause: CausedBy
    tokens: int
    now_us: int
    late: bool = False


class PartitionMeter:
    """The state of one packed partition; `load` gives a scope's stored state when it is first needed."""

    def __init__(self, partition: int, load: Load, seen: SeenIds) -> None:
        """Start with what was stored."""
        self.partition = partition
        self.seen = seen
        self.states: dict[str, ScopeState] = {}
        self.causes: dict[str, CausedBy] = {}
        self.due = Due()
        self._load = load

    def state(self, scope: str) -> ScopeState:
        """Return a scope's state, from memory or from what was stored."""
        state = self.states.get(scope)
        if state is None:
            state = self.states[scope] = self._load(scope) or ScopeState()
        return state

    def apply(self, usages: Sequence[PackedUsage], policies: Policies, book: PriceBook, now_us: int) -> Outcome:
        """Fold one packed message into the state and return what follows from it."""
        outcome = Outcome()
        for packed in usages:
            usage, origin = packed.u, packed.origin
            if usage.kind == "finished":
                self._finished(usage, origin, packed.t, policies, book, now_us, outcome)
            else:
                self._in_flight(usage, origin, packed.t, policies, book, now_us, outcome)
        return outcome

    def _finished(
        self,
        usage: Usage,
        origin: Origin,
        produced_at_ms: int,
        policies: Policies,
        book: PriceBook,
        now_us: int,
        outcome: Outcome,
    ) -> None:
        digest = usage_digest(usage)
        verdict = self.seen.judge(digest, origin)
        step = self._step(usage, origin, produced_at_ms, book, now_us)
        if verdict == "duplicate":
            outcome.duplicates += 1
            outcome.entries.append(_entry("duplicate", step))
            return
        if verdict == "new":
            self.seen.remember(digest, origin)
        else:
            outcome.replays += 1
        agent = agent_scope(usage.workspace, usage.team, usage.agent)
        for scope in (agent, *shared_scopes(usage)):
            state = self._advance(scope, step, outcome)
            if state is None:
                continue
            state.spend.settle(_call(scope, agent, usage))
            plan = policies.of(scope).plan
            step.late |= state.spend.add(plan, step.cause.ts_us, now_us, step.charge.cost_nanos, step.tokens)
        self._judge_agent(agent, step, policies, outcome)
        outcome.entries.append(_entry("charge", step))

    def _in_flight(
        self,
        usage: Usage,
        origin: Origin,
        produced_at_ms: int,
        policies: Policies,
        book: PriceBook,
        now_us: int,
        outcome: Outcome,
    ) -> None:
        finished = self.seen.origins.get(usage_digest(usage, "finished"))
        # A straggler, whose call has been charged, is ignored. On a replay the ids may know what the sums do not yet:
        # there the charge lies behind, and the hold is taken as it was the first time.
        if finished is not None and (finished[0] != origin.partition or finished[1] <= origin.position):
            return
        step = self._step(usage, origin, produced_at_ms, book, now_us)
        deadline_us = to_us(usage.deadline) if usage.deadline else now_us + HOLD_US_DEFAULT
        deadline_us = min(deadline_us, now_us + HOLD_US_MAX)
        bound = Hold(step.charge.cost_nanos, step.tokens, deadline_us)
        agent = agent_scope(usage.workspace, usage.team, usage.agent)
        for scope in (agent, *shared_scopes(usage)):
            state = self._advance(scope, step, outcome)
            if state is None:
                continue
            call = _call(scope, agent, usage)
            hold, known = bound, state.spend.holds.get(call)
            if known is not None and known.deadline_us > now_us:
                # Progress beyond the bound raises the hold; below it the bound stands. Only a deadline extends it.
                until_us = max(known.deadline_us, deadline_us) if usage.deadline else known.deadline_us
                hold = Hold(max(bound.nanos, known.nanos), max(bound.tokens, known.tokens), until_us)
            if state.spend.hold(call, hold, now_us):
                self.due.watch(scope, hold.deadline_us)
        self._judge_agent(agent, step, policies, outcome)

    def _step(self, usage: Usage, origin: Origin, produced_at_ms: int, book: PriceBook, now_us: int) -> _Step:
        cause = CausedBy(usage.id, to_us(usage.ts), origin.partition, origin.offset, produced_at_ms)
        return _Step(usage, origin, book.charge(usage), cause, usage.tokens.total, now_us)

    def _advance(self, scope: str, step: _Step, outcome: Outcome) -> ScopeState | None:
        """Move a scope's watermark past a usage; None when the usage is already in its sums."""
        state = self.state(scope)
        position = step.origin.position
        if position <= state.marks.get(step.origin.partition, -1):
            return None
        state.marks[step.origin.partition] = position
        self.causes[scope] = step.cause
        outcome.touched.add(scope)
        return state

    def _judge_agent(self, agent: str, step: _Step, policies: Policies, outcome: Outcome) -> None:
        if agent not in outcome.touched:
            return
        state = self.state(agent)
        policy = policies.of(agent)
        if policy.limits:
            held = Held(*state.spend.held(step.now_us)) if state.spend.holds else Held()
            _gather(
                outcome.effects,
                decide(
                    agent,
                    policy,
                    state.spend,
                    held,
                    state.fuses,
                    step.cause,
                    now_us=step.now_us,
                    price_book=step.charge.price_book,
                ),
            )
        if step.charge.priced_by == "ceiling":
            self._unknown_model(agent, state, step, policies, outcome)

    def _unknown_model(self, agent: str, state: ScopeState, step: _Step, policies: Policies, outcome: Outcome) -> None:
        usage = step.usage
        scopes = (agent, *shared_scopes(usage))
        deny = {budget.id: budget for scope in scopes for budget in policies.of(scope).deny_unknown}
        model = f"{usage.provider}/{usage.model}"
        if deny:
            _gather(
                outcome.effects,
                deny_unknown_model(
                    agent,
                    tuple(deny.values()),
                    state.fuses,
                    step.cause,
                    model,
                    now_us=step.now_us,
                    price_book=step.charge.price_book,
                ),
            )
        if any(policies.of(scope).warn_unknown for scope in scopes) and state.noted.get(model, 0) <= step.now_us:
            if len(state.noted) >= NOTED_MAX:
                state.noted.clear()
            state.noted[model] = calendar_window("day", "UTC", step.now_us).end_us
            outcome.effects.alerts.append(_unknown_alert(agent, model, step))

    def reconsider(self, scope: str, policies: Policies, book: PriceBook, now_us: int) -> Effects | None:
        """Judge one agent's scope again after budgets or prices changed."""
        state = self.state(scope)
        return reconsider(
            scope,
            policies.of(scope),
            state.spend,
            Held(*state.spend.held(now_us)),
            state.fuses,
            now_us=now_us,
            price_book=book.version,
            denying=policies.denying,
        )

    def watch(self, scope: str) -> None:
        """Have a scope looked at again when the next of its holds passes its deadline."""
        spend = self.state(scope).spend
        next_us = min((hold.deadline_us for hold in spend.holds.values()), default=None)
        if next_us is not None:
            self.due.watch(scope, next_us)

    def passed(self, scope: str, policies: Policies, book: PriceBook, now_us: int) -> Effects | None:
        """Judge a scope whose time came: holds past their deadlines are forgotten, and what they tripped rearms."""
        state = self.state(scope)
        state.spend.release_expired(now_us)
        self.watch(scope)
        if scope_kind(scope) != "agent":
            return None  # its partitions' sum decides, where the rollup is
        held = Held(*state.spend.held(now_us))
        cause = NOBODY._replace(ts_us=now_us)
        policy = policies.of(scope)
        return decide(scope, policy, state.spend, held, state.fuses, cause, now_us=now_us, price_book=book.version)

    def remaining(self, scope: str, policies: Policies, now_us: int) -> list[Remaining]:
        """Return what is left of the caps of an agent, and have it looked at again when a rolling sum falls."""
        state = self.state(scope)
        cause = self.causes.get(scope)
        rolls_us = rolls_at(policies.of(scope), state.spend, now_us)
        if rolls_us is not None:
            self.due.watch(scope, rolls_us)
        return remaining_of(
            scope,
            policies.of(scope),
            state.spend,
            Held(*state.spend.held(now_us)),
            now_us=now_us,
            as_of_ms=cause.produced_at_ms if cause else -1,
        )

    def rollup(self, scope: str, as_of: int, now_us: int) -> Rollup | None:
        """Return this partition's share of a shared scope; None for an agent's, which is nobody else's."""
        cause = self.causes.get(scope)
        if scope_kind(scope) == "agent" or cause is None:
            return None
        spend = self.state(scope).spend
        spend.release_expired(now_us)
        nanos, tokens = spend.held(now_us)
        steps = spend.held_steps(now_us) if spend.holds else []
        return Rollup.model_construct(  # our own integers: validated where they are read
            v=1,
            scope=scope,
            partition=self.partition,
            as_of=as_of,
            windows=spend.windows,
            rolling=spend.rolling,
            held_nanos=nanos,
            held_tokens=tokens,
            held_until_us=spend.held_until(),
            held_steps=steps if len(steps) > 1 else None,
            first_us=spend.first_us,
            newest_us=spend.newest_us,
            cause=Cause.model_construct(
                usage_id=cause.usage_id,
                ts=from_us(cause.ts_us),
                partition=cause.partition,
                offset=cause.offset,
                produced_at_ms=cause.produced_at_ms,
            ),
        )


def _call(scope: str, agent: str, usage: Usage) -> str:
    """Return the key of a call in a scope's holds: ids are an agent's own, so elsewhere its path belongs to them."""
    return usage.id if scope == agent else f"{usage.agent_path}/{usage.id}"


def _gather(into: Effects, effects: Effects | None) -> None:
    if effects is not None:
        into.commands += effects.commands
        into.shadow += effects.shadow
        into.alerts += effects.alerts


def _entry(kind: str, step: _Step) -> LedgerEntry:
    charge, origin = step.charge, step.origin
    # Trusted: every value was validated at the intake, or computed here from validated integers.
    priced = trusted(WireCharge, {**charge._asdict(), "rates": list(charge.rates)})
    return trusted(
        LedgerEntry,
        {
            "kind": kind,
            "topic": USAGE.name,
            "partition": origin.partition,
            "offset": origin.offset,
            "index": origin.nth,
            "at": from_us(step.now_us),
            "late": step.late,
            "usage": step.usage,
            "charge": priced,
            "command": None,
            "ack": None,
            "alert": None,
            "data": None,
        },
    )


def _unknown_alert(agent: str, model: str, step: _Step) -> Alert:
    digest = usage_digest(step.usage, f"unknown-model {model}")
    return Alert(
        id=(digest + b"\0\0\0\0").hex(),
        ts=from_us(step.now_us),
        kind="unknown_model",
        severity="warning",
        scope=agent,
        usage_id=step.usage.id,
        message=f"{agent} used {model}, which has no price; it is charged at the dearest rate of its provider."[:512],
    )
