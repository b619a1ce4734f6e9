"""The meter: one packed partition's usage, folded into its scopes, and the agents' caps checked at once.

Every key has its own watermark: a usage at or below it changes nothing there, so a replay is harmless whichever of
the keys had become durable (design.md section 6).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from spendfuse.engine.call import Call, Who
from spendfuse.engine.crossings import NOTHING_HELD, Held
from spendfuse.engine.decide import decide, deny_unknown_model, reconsider, stays_quiet
from spendfuse.engine.due import Due
from spendfuse.engine.ids import SeenIds, call_digest
from spendfuse.engine.orders import NOBODY, CausedBy, Effects
from spendfuse.engine.policies import Policies
from spendfuse.engine.prices import Charge, PriceBook
from spendfuse.engine.remaining import remaining_of, rolls_at
from spendfuse.engine.spend import Hold, misses
from spendfuse.engine.state import NOTED_MAX, ScopeState
from spendfuse.engine.windows import QUARTER_US, calendar_window
from spendfuse.wire.base import from_us
from spendfuse.wire.control import Alert, Cause
from spendfuse.wire.ledger import Charge as WireCharge
from spendfuse.wire.ledger import LedgerEntry
from spendfuse.wire.remaining import Remaining
from spendfuse.wire.rollup import Rollup
from spendfuse.wire.scopes import scope_kind
from spendfuse.wire.topics import USAGE
from spendfuse.wire.usage import Usage

HOLD_US_DEFAULT: Final = 600_000_000
"""How long a call in flight without a deadline is held."""
HOLD_US_MAX: Final = 86_400_000_000

Load = Callable[[str], ScopeState | None]


class Charged(NamedTuple):
    """A call with its price: charged, found to be a duplicate of one that was, or (in flight) the most it may cost.

    `late` as the ledger says it.
    """

    kind: Literal["charge", "duplicate", "hold"]
    call: Call
    charge: Charge
    late: bool
    at_us: int

    def entry(self) -> LedgerEntry:
        """Return it as the ledger has it; `pipeline.ledger_text` writes the same without the objects.

        Raises `ValueError` for a hold, which the ledger does not have.
        """
        call, charge = self.call, self.charge
        if self.kind == "hold":
            raise ValueError(f"{call.used.id} is in flight: the ledger has it once it is charged")
        return LedgerEntry(
            kind=self.kind,
            topic=USAGE.name,
            partition=call.partition,
            offset=call.offset,
            index=call.nth,
            at=from_us(self.at_us),
            late=self.late,
            usage=Usage.model_validate_json(call.body),
            charge=WireCharge(**charge._asdict() | {"rates": list(charge.rates)}),
        )


@dataclass(slots=True)
class Outcome:
    """What one packed message led to: charges for the ledger, effects, and the scopes whose state changed."""

    charged: list[Charged] = field(default_factory=list)
    effects: Effects = field(default_factory=Effects)
    touched: set[str] = field(default_factory=set)
    replays: int = 0
    duplicates: int = 0

    @property
    def entries(self) -> list[LedgerEntry]:
        """Return what was charged, as entries of the ledger."""
        return [each.entry() for each in self.charged]


@dataclass(slots=True)
class _Round:
    """One packed message: what is in force, what has come of it so far, and what its scopes still take in.

    `last` is the last call of each scope that changed.
    """

    policies: Policies
    book: PriceBook
    now_us: int
    outcome: Outcome = field(default_factory=Outcome)
    last: dict[str, Call] = field(default_factory=dict)
    agents: dict[str, list[Charged]] = field(default_factory=dict)
    shared: dict[str, list[Charged]] = field(default_factory=dict)
    late: dict[tuple[Who, int], bool] = field(default_factory=dict)
    decided: list[tuple[Call, Effects]] = field(default_factory=list)


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

    def forget(self, scope: str) -> None:
        """Drop a scope from memory; what is stored of it is read back when it is needed."""
        self.states.pop(scope, None)
        self.causes.pop(scope, None)

    def apply(self, calls: Sequence[Call], policies: Policies, book: PriceBook, now_us: int) -> Outcome:
        """Fold one packed message into the state and return what follows from it.

        Each scope takes in its calls of the message together, in their order. Of an agent that is the same as one by
        one, with a judgement at every call, as long as all of them reach no line of a cap; else they go one by one.
        """
        this = _Round(policies, book, now_us)
        for call in calls:
            if call.used.kind == "finished":
                self._finished(call, this)
            else:
                self._in_flight(call, this)
        for scope, steps in this.agents.items():
            self._fold_agent(scope, steps, this)
        for scope, steps in this.shared.items():
            self._fold_shared(scope, steps, this)
        if this.decided:  # told in the order of the calls, however the message was split
            order = {(call.partition, call.position): nth for nth, call in enumerate(calls)}
            this.decided.sort(key=lambda each: order[each[0].partition, each[0].position])
            for _, effects in this.decided:
                _gather(this.outcome.effects, effects)
        for scope, call in this.last.items():
            self.causes[scope] = _cause(call)
        this.outcome.touched |= this.last.keys()
        return this.outcome

    def _finished(self, call: Call, this: _Round) -> None:
        used, outcome = call.used, this.outcome
        digest = call_digest(call.who.path, used.id, "finished")
        verdict = self.seen.judge(digest, call)
        charge = this.book.price(used, call.ts_us)
        if verdict == "duplicate":
            outcome.duplicates += 1
            outcome.charged.append(Charged("duplicate", call, charge, False, this.now_us))
            return
        if verdict == "new":
            self.seen.remember(digest, call)
        else:
            outcome.replays += 1
        step = Charged("charge", call, charge, self._is_late(call, this), this.now_us)
        outcome.charged.append(step)
        _hand_out(step, this)

    def _in_flight(self, call: Call, this: _Round) -> None:
        used = call.used
        finished = self.seen.origins.get(call_digest(call.who.path, used.id, "finished"))
        # A straggler, whose call has been charged, is ignored. On a replay the ids may know what the sums do not yet:
        # there the charge lies behind, and the hold is taken as it was the first time.
        if finished is not None and (finished[0] != call.partition or finished[1] <= call.position):
            return
        _hand_out(Charged("hold", call, this.book.price(used, call.ts_us), False, this.now_us), this)

    def _fold_agent(self, agent: str, steps: list[Charged], this: _Round) -> None:
        """Bring an agent up to date, and judge its caps: together when no step can reach a line, else at each."""
        state, policy = self.state(agent), this.policies.of(agent)
        spend = state.spend
        fresh = _fresh(steps, state.marks)
        if not fresh:
            return
        this.last[agent] = fresh[-1].call
        plain = not spend.holds and all(step.kind == "charge" and step.charge.priced_by != "ceiling" for step in fresh)
        charges = _charges(fresh)
        if plain and stays_quiet(policy, spend, state.fuses, charges, this.now_us):
            spend.add_all(policy.plan, charges, this.now_us)
            return
        for step in fresh:
            call = step.call
            if step.kind == "hold":
                self._hold(agent, call.used.id, state, step)
            else:
                spend.settle(call.used.id)
                spend.add(policy.plan, call.ts_us, this.now_us, step.charge.cost_nanos, call.tokens)
            self._judge_agent(state, step, this)

    def _fold_shared(self, scope: str, steps: list[Charged], this: _Round) -> None:
        """Bring a shared scope up to date; its caps are judged on the sum of all partitions, where the rollup is."""
        state = self.state(scope)
        fresh = _fresh(steps, state.marks)
        if not fresh:
            return
        this.last[scope] = fresh[-1].call
        spend = state.spend
        if spend.holds or any(step.kind == "hold" for step in fresh):
            for step in fresh:
                # An id is an agent's own, so where agents share a scope its path belongs to it.
                name = f"{step.call.who.path}/{step.call.used.id}"
                if step.kind == "hold":
                    self._hold(scope, name, state, step)
                else:
                    spend.settle(name)
        spend.add_all(this.policies.of(scope).plan, _charges(fresh), this.now_us)

    def _hold(self, scope: str, name: str, state: ScopeState, step: Charged) -> None:
        call, now_us = step.call, step.at_us
        deadline_us = now_us + HOLD_US_DEFAULT if call.deadline_us is None else call.deadline_us
        deadline_us = min(deadline_us, now_us + HOLD_US_MAX)
        hold, known = Hold(step.charge.cost_nanos, call.tokens, deadline_us), state.spend.holds.get(name)
        if known is not None and known.deadline_us > now_us:
            # Progress beyond the bound raises the hold; below it the bound stands. Only a deadline extends it.
            until_us = known.deadline_us if call.deadline_us is None else max(known.deadline_us, deadline_us)
            hold = Hold(max(hold.nanos, known.nanos), max(hold.tokens, known.tokens), until_us)
        if state.spend.hold(name, hold, now_us):
            self.due.watch(scope, hold.deadline_us)

    @staticmethod
    def _is_late(call: Call, this: _Round) -> bool:
        """Say whether some window of the event time, of any of its scopes, had closed."""
        when = (call.who, call.ts_us // QUARTER_US)
        late = this.late.get(when)
        if late is None:
            plans = {this.policies.of(scope).plan for scope in (call.who.agent, *call.who.shared)}
            late = this.late[when] = any(misses(plan, call.ts_us, this.now_us) for plan in plans)
        return late

    def _judge_agent(self, state: ScopeState, step: Charged, this: _Round) -> None:
        call, agent = step.call, step.call.who.agent
        policy, spend, now_us = this.policies.of(agent), state.spend, step.at_us
        held = Held(*spend.held(now_us)) if spend.holds else NOTHING_HELD
        if policy.limits:
            effects = decide(
                agent, policy, spend, held, state.fuses, _cause(call), now_us=now_us, price_book=step.charge.price_book
            )
            if effects is not None:
                this.decided.append((call, effects))
        if step.charge.priced_by == "ceiling":
            self._unknown_model(agent, state, step, this)

    def _unknown_model(self, agent: str, state: ScopeState, step: Charged, this: _Round) -> None:
        call, policies = step.call, this.policies
        scopes = (agent, *call.who.shared)
        deny = {budget.id: budget for scope in scopes for budget in policies.of(scope).deny_unknown}
        model = f"{call.used.provider}/{call.used.model}"
        if deny:
            effects = deny_unknown_model(
                agent,
                tuple(deny.values()),
                state.fuses,
                _cause(call),
                model,
                now_us=step.at_us,
                price_book=step.charge.price_book,
            )
            if effects is not None:
                this.decided.append((call, effects))
        if any(policies.of(scope).warn_unknown for scope in scopes) and state.noted.get(model, 0) <= step.at_us:
            if len(state.noted) >= NOTED_MAX:
                state.noted.clear()
            state.noted[model] = calendar_window("day", "UTC", step.at_us).end_us
            this.decided.append((call, Effects(alerts=[_unknown_alert(agent, model, step)])))

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


def _hand_out(step: Charged, this: _Round) -> None:
    """Give a step to the scopes of its call."""
    who = step.call.who
    steps = this.agents.get(who.agent)
    if steps is None:
        this.agents[who.agent] = [step]
    else:
        steps.append(step)
    for scope in who.shared:
        steps = this.shared.get(scope)
        if steps is None:
            this.shared[scope] = [step]
        else:
            steps.append(step)


def _fresh(steps: list[Charged], marks: dict[int, int]) -> list[Charged]:
    """Return the steps above a scope's watermarks, which move past them; what is below is in its sums already."""
    fresh = []
    for step in steps:
        call = step.call
        if call.position > marks.get(call.partition, -1):
            marks[call.partition] = call.position
            fresh.append(step)
    return fresh


def _charges(steps: list[Charged]) -> list[tuple[int, int, int]]:
    return [(step.call.ts_us, step.charge.cost_nanos, step.call.tokens) for step in steps if step.kind == "charge"]


def _cause(call: Call) -> CausedBy:
    return CausedBy(call.used.id, call.ts_us, call.partition, call.offset, call.produced_at_ms)


def _gather(into: Effects, effects: Effects) -> None:
    into.commands += effects.commands
    into.shadow += effects.shadow
    into.alerts += effects.alerts


def _unknown_alert(agent: str, model: str, step: Charged) -> Alert:
    digest = call_digest(step.call.who.path, step.call.used.id, f"unknown-model {model}")
    return Alert(
        id=(digest + b"\0\0\0\0").hex(),
        ts=from_us(step.at_us),
        kind="unknown_model",
        severity="warning",
        scope=agent,
        usage_id=step.call.used.id,
        message=f"{agent} used {model}, which has no price; it is charged at the dearest rate of its provider."[:512],
    )
