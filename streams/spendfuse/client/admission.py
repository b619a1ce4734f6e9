"""Whether a call may start: what is left of every cap over the agent, and whose turn it is for the last of one."""

import random
from collections.abc import Sequence
from time import monotonic
from typing import Final

from spendfuse.client.clock import wall_clock
from spendfuse.client.halted import Halted, NoRoom
from spendfuse.client.identity import Identity
from spendfuse.client.lease import Amount, Lease, Room
from spendfuse.client.prices import shipped_book
from spendfuse.client.turns import Turns
from spendfuse.engine.prices import PriceBook
from spendfuse.engine.sentences import amount
from spendfuse.wire.base import to_us
from spendfuse.wire.control import Command
from spendfuse.wire.usage import Usage

COLD_S: Final = 1.0
"""How long after the first call others wait to hear of a cap: until then nobody knows that there is one."""


class Bounds:
    """What usages are worth by a price book: the one that ships, unless another is given."""

    def __init__(self, book: PriceBook | None) -> None:
        self._book = book

    def of(self, usage: Usage) -> Amount:
        """Return the money and tokens of a usage."""
        if self._book is None:
            self._book = shipped_book()
        return Amount(self._book.charge(usage).cost_nanos, usage.tokens.total)


class Admission:
    """The lease of one agent and its turns. The guard's lock protects it; instants in microseconds are arguments."""

    def __init__(self, identity: Identity) -> None:
        self.lease = Lease(identity.scopes)
        self._agent = identity.agent_scope
        self._turns = Turns()
        self._first_call_at: float | None = None

    def admit(self, call_id: str, bound: Amount, deadline_us: int, now_us: int, *, live: bool, patient: bool) -> bool:
        """Count a call from now on at its bound; raise NoRoom if it does not fit.

        Returns False, and counts nothing, while it must wait until what was started before is heard of (`patient`);
        at the end of its patience a call is refused while a worker is alive (`live`), since others may have taken the
        rest.
        """
        room = self.lease.no_room(bound, now_us)
        if room is None:
            waits = live and (self.lease.is_crowded(bound, now_us) or self._must_wait(bound, now_us))
            if patient and (waits or (live and self._is_cold())):
                return False
            if not waits or self._is_cold():
                if self._first_call_at is None:
                    self._first_call_at = monotonic()
                self.started(call_id, bound, deadline_us)
                return True
            left, rest = min(self.lease.rests(now_us), key=lambda pair: pair[1])
            room = Room(left, rest, bound.tokens if left.unit == "tokens" else bound.nanos)
        raise self._no_room(room, now_us)

    def confirmed(self, call_id: str, bound: Amount, now_us: int) -> bool | None:
        """Say whether a worker has counted a call that was announced, None where that does not matter.

        Raises NoRoom when others have taken what it needs.
        """
        if not self.lease.needs_confirmation(call_id, bound, now_us):
            return None
        known, room = self.lease.confirmed(call_id, now_us)
        if room is not None:
            raise self._no_room(room, now_us)
        return known

    def refuse(self, halted: Halted, halts: Sequence[Command], bound: Amount | None, now_us: int) -> None:
        """Raise what keeps a call from starting under these halts; without a bound, calls in flight alone keep none."""
        if halted.command is None or not all(_is_of_holds(halt) for halt in halts):
            raise halted
        if bound is None:
            return
        filled = self.lease.filled_by_calls(halts, now_us)
        if filled is None:
            raise halted
        left, rest = filled
        needed = bound.tokens if left.unit == "tokens" else bound.nanos
        raise self._no_room(Room(left, rest, needed), now_us) from halted

    def started(self, call_id: str, bound: Amount, deadline_us: int) -> None:
        """Count a call at its bound from now on, until it is finished or its deadline has come."""
        self.lease.start(call_id, bound, _wall_ms(), deadline_us)

    def finished(self, call_id: str, used: Amount) -> None:
        """Count a call at what it used."""
        self.lease.finish(call_id, used, _wall_ms())

    def took_turn(self, *, gave_way: bool) -> None:
        """Note how a call that needed much of what was left ended its wait."""
        if gave_way:
            self._turns.lost(monotonic(), random.random())  # noqa: S311 - to differ from other processes, no secret
        else:
            self._turns.won()

    def _must_wait(self, bound: Amount, now_us: int) -> bool:
        """Say whether a call that needs much of what is left comes too soon after one that gave way to others'."""
        return self._turns.must_wait(monotonic()) and self.lease.will_need_confirmation(bound, now_us)

    def _is_cold(self) -> bool:
        """Say whether a first call has just been announced, and nothing been heard of any cap yet."""
        if self._first_call_at is None or self.lease.heard:
            return False
        return monotonic() - self._first_call_at < COLD_S

    def _no_room(self, room: Room, now_us: int) -> NoRoom:
        left = room.remaining
        age_s = max(0, now_us - to_us(left.at)) / 1e6
        return NoRoom(
            f"{self._agent} may not start this call: it may use up to {amount(room.needed, left.unit)}, "
            f"and {left.scope} has {amount(max(0, room.left), left.unit)} left of its cap of "
            f"{amount(left.amount, left.unit)} ({left.budget}, cap {left.cap}; known {age_s:.1f} s ago). "
            "Ask for a smaller answer, or try again when calls in flight have ended",
            *(left, room.needed, room.left),
        )


def _is_of_holds(halt: Command) -> bool:
    """Say whether a halt was for calls in flight alone: it is lifted when they end below their bounds."""
    return halt.measure is not None and halt.measure.spend < halt.measure.cap


def _wall_ms() -> int:
    return wall_clock() // 1_000  # what Kafka stamps are compared with, whatever clock the agent lives by
