"""What is left for one agent by its guard's own count. Pure: times are arguments.

Of each cap it knows the last `Remaining`, and adds what this process emitted later than that record knows. So a guard
that hears nothing more goes on counting against the last known remaining: a lease, that only its own calls use up.

What it cannot know is what others start meanwhile. So before it hears of its own calls again, it starts no more than
a `SHARE` of what was left: eight processes that hear at the same time stay below the cap, and three of which each may
still go by the record before. A single call that needs more than that is started alone, and must be confirmed: the
guard waits until the worker has counted it, and what the others started meanwhile.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from spendfuse.wire.base import to_us
from spendfuse.wire.control import Command
from spendfuse.wire.remaining import Remaining

RECORDS_MAX: Final = 1_000
"""Most caps of one agent's scopes that are remembered."""
CALLS_MAX: Final = 2_000
"""Most calls counted singly; the oldest finished ones are then counted as one sum."""
AGE_US_MAX: Final = 86_400_000_000
"""A record older than the topic keeps them says nothing any more."""
SHARE: Final = 8
"""One part in so many of what is left may be started before it is heard of."""
US_PER_MS: Final = 1_000
UNKNOWN_AGE_MS: Final = 1_000
"""How long before it was said a record is taken to be, that does not say which usage it knows."""


class Amount(NamedTuple):
    """Money and tokens of a call: nano-units of the price book's currency, and tokens."""

    nanos: int
    tokens: int


NONE: Final = Amount(0, 0)


class Room(NamedTuple):
    """A cap that a call does not fit into: what is left of it by our own count, and what the call needs."""

    remaining: Remaining
    left: int
    needed: int


@dataclass(slots=True)
class _Call:
    """A call: its bound while it runs, then what it used; wall times in ms of what was emitted of it."""

    bound: Amount
    started_ms: int
    deadline_us: int
    used: Amount | None = None
    finished_ms: int = 0


class Lease:
    """The last remaining of each cap over an agent, and the agent's own calls that these may not know of."""

    def __init__(self, scopes: Sequence[str]) -> None:
        self._scopes = frozenset(scopes)
        self._left: dict[str, Remaining] = {}
        self._calls: OrderedDict[str, _Call] = OrderedDict()
        self._folded, self._folded_ms = NONE, 0

    @property
    def in_flight(self) -> int:
        """Return how many calls have started and not finished."""
        return sum(call.used is None for call in self._calls.values())

    def concerns(self, scope: str) -> bool:
        """Say whether a scope's remaining limits this agent."""
        return scope in self._scopes

    def hear(self, left: Remaining) -> bool:
        """Take in a record whose signature is known to be right; say whether it was news."""
        known = self._left.get(left.key)
        if not self.concerns(left.scope) or (known is not None and left.at < known.at):
            return False
        if left.withdrawn:
            self._left.pop(left.key, None)
            return known is not None
        if known is None and len(self._left) >= RECORDS_MAX:
            return False
        self._left[left.key] = left
        self._forget()
        return True

    def start(self, call_id: str, bound: Amount, now_ms: int, deadline_us: int) -> None:
        """Count a call at its upper bound from now on."""
        if call_id not in self._calls:
            self._calls[call_id] = _Call(bound, now_ms, deadline_us)
            self._fold()

    def extend(self, call_id: str, bound: Amount, deadline_us: int) -> None:
        """Raise the bound of a call that has used more than was said."""
        call = self._calls.get(call_id)
        if call is not None and call.used is None:
            call.bound = Amount(max(call.bound.nanos, bound.nanos), max(call.bound.tokens, bound.tokens))
            call.deadline_us = max(call.deadline_us, deadline_us)

    def finish(self, call_id: str, used: Amount, now_ms: int) -> None:
        """Count a call at what it used; one that was never started counts from now."""
        call = self._calls.get(call_id)
        if call is None:
            self._calls[call_id] = _Call(used, now_ms, 0, used, now_ms)
            self._fold()
        elif call.used is None:
            call.used, call.finished_ms = used, now_ms

    def no_room(self, needed: Amount, now_us: int) -> Room | None:
        """Return the fullest cap that a call does not fit into, None if it fits into all.

        A call that fills a cap does not fit: the fuse would trip as it starts.
        """
        found = [
            Room(left, rest, _in_unit(needed, left))
            for left, rest in self.rests(now_us)
            if rest <= max(_in_unit(needed, left), 0)
        ]
        return min(found, key=lambda room: room.left - room.needed, default=None)

    def filled_by_calls(self, halts: Sequence[Command], now_us: int) -> tuple[Remaining, int] | None:
        """Return what was heard of the first of these halts' caps, None unless each is still below its cap in spend."""
        known = {left.key: (left, rest) for left, rest in self.rests(now_us)}
        found = [known.get(halt.key) for halt in halts]
        if not all(each is not None and each[0].spend < each[0].amount for each in found):
            return None
        return found[0] if found else None

    @property
    def heard(self) -> bool:
        """Say whether anything is known to remain."""
        return bool(self._left)

    def is_crowded(self, needed: Amount, now_us: int) -> bool:
        """Say whether a call must wait until what was started before it has been heard of."""
        for left, rest in self.rests(now_us):
            unheard = sum(
                _in_unit(call.bound if call.used is None else call.used, left)
                for call in self._calls.values()
                if call.started_ms > _as_of_ms(left)
            )
            if unheard and (unheard + _in_unit(needed, left)) * SHARE > rest + unheard:
                return True
        return False

    def needs_confirmation(self, call_id: str, bound: Amount, now_us: int) -> bool:
        """Say whether a started call is so large a part of what was left that others may have taken it meanwhile."""
        if call_id not in self._calls:
            return False
        return any(_in_unit(bound, left) * SHARE > rest + _in_unit(bound, left) for left, rest in self.rests(now_us))

    def will_need_confirmation(self, bound: Amount, now_us: int) -> bool:
        """Say whether a call, once started, is so large a part of what is left."""
        return any(_in_unit(bound, left) * SHARE > rest for left, rest in self.rests(now_us))

    def confirmed(self, call_id: str, now_us: int) -> tuple[bool, Room | None]:
        """Say whether every record knows of a call, and the cap that is passed with it, if any."""
        call = self._calls.get(call_id)
        if call is None:
            return True, None
        known = all(_as_of_ms(left) >= call.started_ms for left, _ in self.rests(now_us))
        passed = [
            Room(left, rest + _in_unit(call.bound, left), _in_unit(call.bound, left))
            for left, rest in self.rests(now_us)
            if rest < 0
        ]
        return known, min(passed, key=lambda room: room.left - room.needed, default=None)

    def rests(self, now_us: int) -> Iterator[tuple[Remaining, int]]:
        """Yield what was last heard of each cap, and what is left of it by our own count (below 0 when passed)."""
        for left in self._left.values():
            if now_us - to_us(left.at) > AGE_US_MAX:
                continue
            committed, in_flight = left.committed, left.committed - left.spend
            if left.resets_at is not None and now_us >= to_us(left.resets_at):
                committed = in_flight  # a new window has begun; calls in flight count in it
            yield left, left.amount - committed - self._own(left, in_flight, now_us)

    def _own(self, left: Remaining, in_flight: int, now_us: int) -> int:
        """Return how far our own calls are beyond what a record knows of them."""
        as_of_ms = _as_of_ms(left)
        more = _in_unit(self._folded, left) if self._folded_ms > as_of_ms else 0
        less = 0
        for call in self._calls.values():
            if call.used is None:
                more += _in_unit(call.bound, left) if call.started_ms > as_of_ms else 0
            elif call.started_ms > as_of_ms:
                more += _in_unit(call.used, left)
            elif call.finished_ms > as_of_ms and call.deadline_us > now_us:
                change = _in_unit(call.used, left) - _in_unit(call.bound, left)
                more, less = more + max(change, 0), less + max(-change, 0)
        return more - min(less, in_flight)  # no more is given back than the record says is held

    def _forget(self) -> None:
        """Drop the calls that every record knows the end of."""
        known_ms = min(_as_of_ms(left) for left in self._left.values())
        for call_id in [name for name, call in self._calls.items() if call.used and call.finished_ms <= known_ms]:
            del self._calls[call_id]
        if self._folded_ms <= known_ms:
            self._folded = NONE

    def _fold(self) -> None:
        """Keep the memory bounded: the oldest finished call, else the oldest, is counted in one sum."""
        while len(self._calls) > CALLS_MAX:
            oldest = next((name for name, call in self._calls.items() if call.used), next(iter(self._calls)))
            call = self._calls.pop(oldest)
            used = call.used or call.bound
            self._folded = Amount(self._folded.nanos + used.nanos, self._folded.tokens + used.tokens)
            self._folded_ms = max(self._folded_ms, call.finished_ms or call.started_ms)


def _as_of_ms(left: Remaining) -> int:
    return left.as_of_ms if left.as_of_ms >= 0 else to_us(left.at) // US_PER_MS - UNKNOWN_AGE_MS


def _in_unit(amount: Amount, left: Remaining) -> int:
    return amount.tokens if left.unit == "tokens" else amount.nanos
