"""The rollup: a shared scope's total is the sum of its partitions' cumulative shares.

A share overwrites what its partition said before, and an older one never replaces a newer one: a grow-only counter,
so that a replay changes nothing.
"""

from spendfuse.engine.decide import NOBODY, CausedBy, Effects, Held, decide, reconsider
from spendfuse.engine.policies import Policies
from spendfuse.engine.remaining import remaining_of
from spendfuse.engine.spend import Spend, merged
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
    cause = rollup.cause
    return True, decide(
        rollup.scope,
        policy,
        merged(part.spend for part in state.parts.values()),
        held_by(state, now_us),
        state.fuses,
        CausedBy(cause.usage_id, to_us(cause.ts), cause.partition, cause.offset, cause.produced_at_ms),
        now_us=now_us,
        price_book=price_book,
        every_window=True,
    )


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
