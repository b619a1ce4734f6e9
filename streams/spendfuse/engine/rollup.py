"""The rollup: a shared scope's total is the sum of its partitions' cumulative shares.

A share overwrites what its partition said before, and an older one never replaces a newer one, so that a replay changes
nothing. What is older is told by the offset a share is as of, never by its sums: a correction makes them fall.
"""

from spendfuse.engine.crossings import Held
from spendfuse.engine.decide import CORRECTED, decide, reconsider
from spendfuse.engine.orders import NOBODY, CausedBy, Effects
from spendfuse.engine.policies import Policies
from spendfuse.engine.remaining import remaining_of
from spendfuse.engine.spend import RUN_KEY, Spend, fell, merged
from spendfuse.engine.state import Part, SharedState
from spendfuse.wire.base import to_us
from spendfuse.wire.remaining import Remaining
from spendfuse.wire.rollup import Rollup


def apply_rollup(
    state: SharedState, rollup: Rollup, policies: Policies, *, now_us: int, price_book: str
) -> tuple[bool, Effects | None]:
    """Take in one partition's share; return whether it was news, and what follows from the new total."""
    known = state.parts.get(rollup.partition)
    if known is not None and rollup.as_of < known.as_of:
        return False, None
    if known is not None and _began_anew(rollup, known):
        _carry(state, rollup.partition, known)
    state.parts[rollup.partition] = Part(
        rollup.as_of,
        Spend(rollup.windows, rollup.rolling, {}, rollup.first_us, rollup.newest_us),
        rollup.held_nanos,
        rollup.held_tokens,
        rollup.held_until_us,
        rollup.held_steps or [],
    )
    policy = policies.of(rollup.scope)
    if not policy.limits:
        return True, None
    said = rollup.cause
    cause = CausedBy(said.usage_id, to_us(said.ts), said.partition, said.offset, said.produced_at_ms)
    whole, held = merged(part.spend for part in state.parts.values()), held_by(state, now_us)
    lifted = None
    if known is not None and fell(known.spend, state.parts[rollup.partition].spend):
        lifted = reconsider(
            rollup.scope, policy, whole, held, state.fuses, now_us=now_us, price_book=price_book, cause=cause,
            reason=CORRECTED,
        )  # fmt: skip
    decided = decide(
        rollup.scope, policy, whole, held, state.fuses, cause, now_us=now_us, price_book=price_book, every_window=True
    )
    if lifted is None or decided is None:
        return True, lifted or decided
    return True, lifted.with_more(decided)


def _began_anew(rollup: Rollup, known: Part) -> bool:
    """Say whether a share no longer holds what it held: its partition had forgotten the scope as idle.

    A cumulative share never loses its first usage, and what comes after the idle bound is younger than all before.
    """
    first_us, newest_us = known.spend.first_us, known.spend.newest_us
    return RUN_KEY in known.spend.windows and bool(first_us) and not 0 < rollup.first_us <= newest_us


def _carry(state: SharedState, partition: int, known: Part) -> None:
    """Keep the run's sum of a share that began anew, under a partition of its own below zero."""
    place = -1 - partition
    before = state.parts.get(place)
    whole = merged([known.spend] if before is None else [known.spend, before.spend])
    spend = Spend({RUN_KEY: whole.windows[RUN_KEY]}, {}, {}, whole.first_us, whole.newest_us)
    state.parts[place] = Part(known.as_of, spend)


def passed_shared(
    scope: str, state: SharedState, policies: Policies, *, now_us: int, price_book: str
) -> Effects | None:
    """Judge a shared scope whose calls in flight have run out: what they tripped rearms."""
    return decide(
        scope,
        policies.of(scope),
        merged(part.spend for part in state.parts.values()),
        held_by(state, now_us),
        state.fuses,
        NOBODY._replace(ts_us=now_us),
        now_us=now_us,
        price_book=price_book,
        every_window=True,
    )


def remaining_shared(
    scope: str, state: SharedState, policies: Policies, *, now_us: int, as_of_ms: int
) -> list[Remaining]:
    """Return what is left of the caps of a shared scope, over all its partitions."""
    spend = merged(part.spend for part in state.parts.values())
    return remaining_of(scope, policies.of(scope), spend, held_by(state, now_us), now_us=now_us, as_of_ms=as_of_ms)


def reconsider_shared(
    scope: str, state: SharedState, policies: Policies, *, now_us: int, price_book: str
) -> Effects | None:
    """Judge a shared scope again after budgets changed."""
    return reconsider(
        scope,
        policies.of(scope),
        merged(part.spend for part in state.parts.values()),
        held_by(state, now_us),
        state.fuses,
        now_us=now_us,
        price_book=price_book,
    )


def held_by(state: SharedState, now_us: int = 0) -> Held:
    """Return the calls in flight of all partitions, as last published, that have not passed their deadlines."""
    held = [part.held(now_us) for part in state.parts.values()]
    return Held(sum(nanos for nanos, _ in held), sum(tokens for _, tokens in held))
