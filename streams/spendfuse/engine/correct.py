"""Corrections: signed differences to earlier charges, folded into the very windows those were added to.

Like usage, a correction changes nothing in a key at or below its watermark. Its id is remembered in the agent's own
state, beside the sums, for longer than a correction may be old: one that is written again is refused, whoever wrote it,
however many usages lie between. A window that would fall below zero keeps its signed sum, so that the order of a usage
and its correction does not matter, counts as zero, and is told by an alert.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from spendfuse.engine.crossings import Held
from spendfuse.engine.decide import CORRECTED, decide, reconsider
from spendfuse.engine.ids import call_digest
from spendfuse.engine.orders import CausedBy, Effects
from spendfuse.engine.policies import Policies
from spendfuse.engine.prices import PriceBook
from spendfuse.engine.spend import misses
from spendfuse.engine.state import Applied, ScopeState
from spendfuse.engine.windows import SECOND_US
from spendfuse.wire.base import from_us, to_us
from spendfuse.wire.control import Alert
from spendfuse.wire.correction import Correction, PackedCorrection
from spendfuse.wire.ledger import LedgerEntry
from spendfuse.wire.packed import INDEX_BITS
from spendfuse.wire.scopes import agent_scope, shared_scopes
from spendfuse.wire.topics import USAGE

if TYPE_CHECKING:
    from spendfuse.engine.meter import PartitionMeter

AGE_US_MAX: Final = 7 * 86_400 * SECOND_US
"""How long ago a correction may have been stated when it arrives; its usage may be of any age."""
KEPT_US: Final = 35 * 86_400 * SECOND_US
"""How long its id is remembered: its age, twice what the topics hold it, and a margin."""
APPLIED_MAX: Final = 10_000
"""Most corrections remembered of one agent; beyond it they are refused until the oldest may be forgotten."""

Verdict = Literal["new", "replay", "duplicate", "currency", "full"]


@dataclass(slots=True)
class Corrected:
    """What one message of corrections led to: entries, effects, refusals with their reason, and the scopes touched."""

    entries: list[LedgerEntry] = field(default_factory=list)
    effects: Effects = field(default_factory=Effects)
    refused: list[tuple[PackedCorrection, str]] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)
    replays: int = 0


def correct(
    meter: "PartitionMeter", items: Iterable[PackedCorrection], policies: Policies, book: PriceBook, now_us: int
) -> Corrected:
    """Fold corrections into the meter's scopes, in their order, and judge the agents' caps at each."""
    outcome = Corrected()
    for item in items:
        correction, origin = item.c, item.origin
        agent = agent_scope(correction.workspace, correction.team, correction.agent)
        state = meter.state(agent)
        verdict = _judge(state, item, book, now_us)
        if verdict not in ("new", "replay"):
            outcome.refused.append((item, _refusal(correction, verdict, state, book)))
            continue
        outcome.replays += verdict == "replay"
        cause = CausedBy(correction.usage_id, to_us(correction.at), origin.partition, origin.offset, item.t)
        late = False
        for scope in (agent, *shared_scopes(correction)):
            late |= misses(policies.of(scope).plan, to_us(correction.ts), now_us)
            if _fold(meter.state(scope), item, scope, policies, now_us):
                outcome.touched.add(scope)
                meter.causes[scope] = cause
                if scope == agent:
                    _judge_agent(agent, state, item, cause, policies, book, now_us, outcome)
        outcome.entries.append(_entry(item, now_us, late=late))
    return outcome


def _judge(state: ScopeState, item: PackedCorrection, book: PriceBook, now_us: int) -> Verdict:
    origin, known = item.origin, state.corrected.get(item.c.id)
    if known is not None:
        return "replay" if known[:2] == (origin.partition, origin.position) else "duplicate"
    if item.c.currency != book.currency:
        return "currency"
    if len(state.corrected) >= APPLIED_MAX:
        for old in [name for name, each in state.corrected.items() if each.at_us + KEPT_US <= now_us]:
            del state.corrected[old]
        if len(state.corrected) >= APPLIED_MAX:
            return "full"
    state.corrected[item.c.id] = Applied(origin.partition, origin.position, to_us(item.c.at))
    return "new"


def _refusal(correction: Correction, verdict: Verdict, state: ScopeState, book: PriceBook) -> str:
    if verdict == "duplicate":
        partition, position, _ = state.corrected[correction.id]
        place = f"{USAGE.name}/{partition}/{position >> INDEX_BITS}"
        return f"duplicate: correction {correction.id} was applied from {place}; a further one needs an id of its own"
    if verdict == "currency":
        return f"currency: {correction.currency} is not {book.currency}, in which everything here is summed"
    return (
        f"full: {correction.agent_path} has {APPLIED_MAX:,} corrections of the last {KEPT_US // (86_400 * SECOND_US)} "
        "days; correct its other usages later, or state their sum as one correction"
    )


def _fold(state: ScopeState, item: PackedCorrection, scope: str, policies: Policies, now_us: int) -> bool:
    """Add the differences to a scope, unless it lies at or below its watermark; say whether it did."""
    correction, origin = item.c, item.origin
    if origin.position <= state.marks.get(origin.partition, -1):
        return False
    state.marks[origin.partition] = origin.position
    state.spend.correct(
        policies.of(scope).plan, to_us(correction.ts), to_us(correction.at), now_us, correction.cost_nanos,
        correction.tokens.total,
    )  # fmt: skip
    return True


def _judge_agent(
    agent: str,
    state: ScopeState,
    item: PackedCorrection,
    cause: CausedBy,
    policies: Policies,
    book: PriceBook,
    now_us: int,
    outcome: Corrected,
) -> None:
    """Lift what the agent's sums no longer reach, and trip what they reach now, closed windows included."""
    policy, spend, held = policies.of(agent), state.spend, Held(*state.spend.held(now_us))
    lifted = reconsider(
        agent, policy, spend, held, state.fuses, now_us=now_us, price_book=book.version, denying=policies.denying,
        cause=cause, reason=CORRECTED,
    )  # fmt: skip
    tripped = decide(
        agent, policy, spend, held, state.fuses, cause, now_us=now_us, price_book=book.version, every_window=True
    )
    for effects in (lifted, tripped):
        if effects is not None:
            outcome.effects = outcome.effects.with_more(effects)
    if spend.is_below_zero():
        outcome.effects.alerts.append(_below_zero(agent, item.c, now_us))


def _below_zero(agent: str, correction: Correction, now_us: int) -> Alert:
    digest = call_digest(correction.agent_path, correction.id, "below-zero")
    return Alert(
        id=(digest + b"\0\0\0\0").hex(),
        ts=from_us(now_us),
        kind="correction",
        severity="warning",
        scope=agent,
        usage_id=correction.usage_id,
        message=(
            f"After correction {correction.id} by {correction.by}, a window of {agent} has had more taken from it than "
            "was charged in it. It counts as zero; compare the correction with the ledger."
        )[:512],
    )


def _entry(item: PackedCorrection, now_us: int, *, late: bool) -> LedgerEntry:
    return LedgerEntry(
        kind="correction",
        topic=USAGE.name,
        partition=item.p,
        offset=item.o,
        index=item.i,
        at=from_us(now_us),
        late=late,
        correction=item.c,
    )
