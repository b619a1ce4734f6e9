"""The pipeline's state, folded anew from the charges and commands that the ledger holds.

Each charge is added as it was the first time: to the windows that were open when it was recorded, so that the sums are
those the meter had, under the budgets in force now. Where its origin still exists it moves the watermarks, and whatever
the source topics hold beyond them is folded as usual; where it does not (another Kafka), sums, fuses and ids are taken
over, and neither watermarks nor origins are. Calls in flight are in no ledger: they are not rebuilt.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from spendfuse.engine.idle import scope_is_idle, shared_is_idle
from spendfuse.engine.ids import FORMER, SeenIds, call_digest
from spendfuse.engine.policies import Policies
from spendfuse.engine.recall import recall
from spendfuse.engine.state import Applied, Fuse, Part, ScopeState, SharedState
from spendfuse.wire.control import Command
from spendfuse.wire.packed import Origin
from spendfuse.wire.scopes import agent_scope, scope_kind

SWEEP_CHARGES: Final = 500_000
"""After so many charges, what had become idle by then is forgotten: a year of runs need not fit into memory."""
NO_OFFSET: Final = -1

Name = tuple[int, str]
"""A packed partition and a scope."""


class Charged(NamedTuple):
    """One charge of the ledger, or a correction; times in microseconds, `origin` None and `as_of` -1 of another Kafka.

    `as_of` is the offset of `usage.packed.v1` that it came with. Of a correction, `call_id` is its own id, `stated_us`
    when it was stated, and nanos and tokens are signed.
    """

    workspace: str
    team: str
    agent: str
    root_run: str
    call_id: str
    ts_us: int
    at_us: int
    nanos: int
    tokens: int
    origin: Origin | None = None
    as_of: int = NO_OFFSET
    stated_us: int | None = None

    @property
    def scopes(self) -> tuple[str, str, str, str]:
        """Return whose money it was, the agent's own first."""
        return (
            agent_scope(self.workspace, self.team, self.agent),
            f"team:{self.workspace}/{self.team}",
            f"workspace:{self.workspace}",
            f"run:{self.workspace}/{self.root_run}",
        )


@dataclass(slots=True)
class Tally:
    """What was folded."""

    charges: int = 0
    repeated: int = 0
    commands: int = 0
    first_at_us: int = 0
    last_at_us: int = 0


@dataclass(slots=True)
class Rebuilt:
    """State in the making: `charge` and `command` in the order of the ledger, then `finish`."""

    policies: Policies
    partition_of: Callable[[str], int]
    idle_us: int
    tally: Tally = field(default_factory=Tally)
    scopes: dict[Name, ScopeState] = field(default_factory=dict)
    shared: dict[Name, SharedState] = field(default_factory=dict)
    seen: dict[int, SeenIds] = field(default_factory=dict)
    reached: dict[int, int] = field(default_factory=dict)
    as_of: dict[Name, int] = field(default_factory=dict)
    _fuses: dict[str, dict[str, Fuse]] = field(default_factory=lambda: defaultdict(dict))

    def charge(self, charged: Charged) -> None:
        """Fold one charge; one that lies at or below a watermark was folded before."""
        path = f"{charged.workspace}/{charged.team}/{charged.agent}"
        partition = self.partition_of(path)
        if charged.stated_us is None:
            self._remember(partition, call_digest(path, charged.call_id, "finished"), charged.origin)
        elif not self._applies(partition, charged, charged.stated_us):
            self.tally.repeated += 1
            return
        news = False
        for scope in charged.scopes:
            news |= self._add(partition, scope, charged)
        if not news:
            self.tally.repeated += 1
            return
        tally = self.tally
        tally.charges += 1
        tally.first_at_us = min(tally.first_at_us or charged.at_us, charged.at_us)
        tally.last_at_us = max(tally.last_at_us, charged.at_us)
        if tally.charges % SWEEP_CHARGES == 0:
            self._sweep(partition, charged.at_us)

    def _remember(self, partition: int, digest: bytes, origin: Origin | None) -> None:
        seen = self.seen.get(partition)
        if seen is None:
            seen = self.seen[partition] = SeenIds()
        if digest in seen.origins:
            return
        if origin is None:
            seen.take_over(digest)
        else:
            seen.remember(digest, origin)

    def _applies(self, partition: int, charged: Charged, stated_us: int) -> bool:
        """Remember a correction as its agent's state does; False for one of the same id from another place."""
        origin = charged.origin
        applied = Applied(FORMER[0], FORMER[1], stated_us)
        if origin is not None:
            applied = Applied(origin.partition, origin.position, stated_us)
        state = self.scopes.setdefault((partition, charged.scopes[0]), ScopeState())
        known = state.corrected.setdefault(charged.call_id, applied)
        return known[:2] == applied[:2]

    def _add(self, partition: int, scope: str, charged: Charged) -> bool:
        name = (partition, scope)
        state = self.scopes.get(name)
        if state is None:
            state = self.scopes[name] = ScopeState()
        origin = charged.origin
        if origin is not None:
            if origin.position <= state.marks.get(origin.partition, NO_OFFSET):
                return False
            state.marks[origin.partition] = origin.position
            self.reached[origin.partition] = max(self.reached.get(origin.partition, NO_OFFSET), origin.offset)
            self.as_of[name] = max(self.as_of.get(name, NO_OFFSET), charged.as_of)
        plan = self.policies.of(scope).plan
        if charged.stated_us is None:
            state.spend.add(plan, charged.ts_us, charged.at_us, charged.nanos, charged.tokens)
        else:
            ts_us, at_us = charged.ts_us, charged.at_us
            state.spend.correct(plan, ts_us, charged.stated_us, at_us, charged.nanos, charged.tokens)
        return True

    def command(self, command: Command, *, sent: bool) -> None:
        """Take in a command, or (not sent) one that was decided in shadow."""
        self.tally.commands += 1
        recall(self._fuses[command.scope], command, self.policies, sent=sent)

    def _sweep(self, partition: int, now_us: int) -> None:
        idle = [
            name
            for name, state in self.scopes.items()
            # A run may live on elsewhere, and then its share counts: it is judged at the end, as a whole.
            if name[0] == partition
            and scope_kind(name[1]) != "run"
            and scope_is_idle(name[1], state, self.policies, now_us, self.idle_us)
        ]
        for name in idle:
            del self.scopes[name]
            self.as_of.pop(name, None)

    def finish(self, now_us: int) -> None:
        """Put fuses to their sums and shares together, drop what has closed, and forget what is idle."""
        for (_, scope), state in self.scopes.items():
            state.spend.prune(self.policies.of(scope).plan, now_us)
        for scope, fuses in self._fuses.items():
            if scope_kind(scope) == "agent":
                path = scope.partition(":")[2]
                self.scopes.setdefault((self.partition_of(path), scope), ScopeState()).fuses = fuses
            else:
                self._whole(scope).fuses = fuses
        for name, state in self.scopes.items():
            if scope_kind(name[1]) != "agent":
                self._whole(name[1]).parts[name[0]] = Part(self.as_of.get(name, NO_OFFSET), state.spend)
        self._forget_idle(now_us)

    def _whole(self, scope: str) -> SharedState:
        return self.shared.setdefault((self.partition_of(scope), scope), SharedState())

    def _forget_idle(self, now_us: int) -> None:
        policies, idle_us = self.policies, self.idle_us
        for name, whole in list(self.shared.items()):
            if shared_is_idle(name[1], whole, policies, now_us, idle_us):
                del self.shared[name]
        for name, state in list(self.scopes.items()):
            lives = scope_kind(name[1]) == "run" and (self.partition_of(name[1]), name[1]) in self.shared
            if not lives and scope_is_idle(name[1], state, policies, now_us, idle_us):
                del self.scopes[name]

    def slots(self) -> Iterator[tuple[int, int, bytes]]:
        """Yield (packed partition, place in the ring, bytes) of every slot of remembered ids; only once."""
        for partition, seen in sorted(self.seen.items()):
            for place, value in seen.take_dirty().items():
                yield partition, place, value
