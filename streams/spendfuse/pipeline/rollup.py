"""The rollup's shell: shares of teams, workspaces and run trees in; their caps judged on the sum of all partitions."""

import asyncio
import re
from collections.abc import Callable
from typing import Final

from pydantic import ValidationError

from spendfuse.client.clock import Clock
from spendfuse.engine.again import Said, recall_unknown, sequences_of, unsaid
from spendfuse.engine.due import Due
from spendfuse.engine.idle import bound_us, shared_is_idle
from spendfuse.engine.remaining import rolls_at
from spendfuse.engine.rollup import apply_rollup, passed_shared, reconsider_shared, remaining_shared
from spendfuse.engine.spend import merged
from spendfuse.engine.state import SharedState
from spendfuse.engine.windows import ROLLING_SLOTS, slot_of, window_of_key
from spendfuse.pipeline.board import Board, Name
from spendfuse.pipeline.codec import decode_shared, encode_shared
from spendfuse.pipeline.feed import PolicyFeed
from spendfuse.pipeline.intake import reason
from spendfuse.pipeline.ledger_text import entry_texts
from spendfuse.pipeline.publish import Publisher
from spendfuse.pipeline.records import Delivery, SourceRecord, Table
from spendfuse.pipeline.refusal import Ends
from spendfuse.pipeline.routing import split_state_key, state_key
from spendfuse.pipeline.sweep import Sweep
from spendfuse.wire.base import from_us
from spendfuse.wire.ledger import LedgerEntry
from spendfuse.wire.remaining import Remaining
from spendfuse.wire.rollup import Rollup
from spendfuse.wire.topics import PACKED

UNACKED_MAX: Final = 2_000
"""Most rollups whose effects are not yet durable; at this many the stage flushes before it reads on."""
STATES_MAX: Final = 20_000
"""Most shared scopes kept decoded; beyond it, those that are written are dropped and read back when needed."""
IDLE_US: Final = bound_us(35, 7 * 86_400)
RECONSIDER_SLICE: Final = 200
LAST_US: Final = 253_370_764_800_000_000
"""The year 9999, in microseconds since the epoch."""
_BEYOND_64_BITS: Final = re.compile(rb"[0-9]{20}")


class RollupStage:
    """The rollup of one worker, over all the rollup partitions it owns at the moment."""

    def __init__(
        self,
        *,
        table: Table,
        publisher: Publisher,
        feed: PolicyFeed,
        clock: Clock,
        generation: Callable[[], int],
        ends: Ends | None = None,
        idle_us: int = IDLE_US,
        said: Said = lambda _: (),
    ) -> None:
        """Take the ports; `generation` changes whenever partitions are assigned anew; `ends` vouches for the state.

        A scope is forgotten after `idle_us`. `said` knows what was commanded, by whatever worker.
        """
        self._ends = ends
        self._idle_us = idle_us
        self._said = said
        self._sweep = Sweep(table.keys)
        # Known to be assigned: a table also holds keys of partitions that have left, which are not ours to delete.
        self._ours: set[int] = set()
        self._table = table
        self._publisher = publisher
        self._feed = feed
        self._clock = clock
        self._generation = generation
        self._current = generation()
        self._states: dict[tuple[int, str], SharedState] = {}
        self._dirty: set[tuple[int, str]] = set()
        self._unacked: list[SourceRecord] = []
        self._deliveries: list[Delivery] = []
        self._board = Board()
        self._due = Due()
        self._as_of_ms: dict[Name, int] = {}
        self._flushing = asyncio.Lock()
        # Held from the change of a state until all it led to is handed over, as in the meter.
        self._changing = asyncio.Lock()

    async def on_record(self, record: SourceRecord) -> None:
        """Take in one partition's share of one scope."""
        generation = self._generation()
        async with self._changing:
            if generation != self._generation():
                return  # it waited while its partition was given away: what is stored here may be old by now
            self._drop_if_reassigned()
            self._ours.add(record.partition)
            self._deliveries += await self._take_in(record)
            self._unacked.append(record)
        if len(self._unacked) >= UNACKED_MAX:
            await self.flush()

    async def _take_in(self, record: SourceRecord) -> list[Delivery]:
        try:
            rollup = Rollup.model_validate_json(record.value or b"")
        except ValidationError as error:
            return [await self._publisher.dead_letter(record, reason(error))]
        if not _is_plausible(rollup, record.value or b""):
            return [await self._publisher.dead_letter(record, "windows or numbers that no meter writes")]
        state = self._state(record.partition, rollup.scope)
        known = state.parts.get(rollup.partition)
        if self._ends is not None and known is not None and rollup.as_of < known.as_of:
            await self._ends.vouch(PACKED.name, rollup.partition, known.as_of)  # else new shares would pass for old
        name = (record.partition, rollup.scope)
        self._dirty.add(name)
        now_us = self._clock()
        news, effects = apply_rollup(
            state, rollup, self._feed.policies, now_us=now_us, price_book=self._feed.book.version
        )
        if news:
            self._as_of_ms[name] = rollup.cause.produced_at_ms
            self._watch(name, state, now_us)
            if self._feed.policies.of(rollup.scope).limits:
                self._board.touch(name)
        if effects is None:
            return []
        deliveries = await self._publisher.effects(effects)
        entries = [
            LedgerEntry(
                kind="decision",
                topic=record.topic,
                partition=record.partition,
                offset=record.offset,
                index=nth,
                at=from_us(now_us),
                command=command,
            )
            for nth, command in enumerate(effects.shadow)
        ]
        title = f"rollup/{record.partition}/{record.offset}"
        return deliveries + await self._publisher.ledger(record.partition, title, entry_texts(entries), now_us)

    def _watch(self, name: Name, state: SharedState, now_us: int) -> None:
        """Have a scope looked at again when calls in flight of a partition run out."""
        until_us = state.held_until_us(now_us)
        if until_us is not None:
            self._due.watch(state_key(*name).decode(), until_us)

    async def _look_again(self) -> None:
        """Judge the scopes about which time alone changed something: calls in flight, rolling sums."""
        now_us = self._clock()
        policies, price_book = self._feed.policies, self._feed.book.version
        for key in self._due.take(now_us):
            name = split_state_key(key.encode())
            state = self._state(*name)
            self._watch(name, state, now_us)
            self._board.touch(name)
            before = sequences_of(state.fuses)
            effects = passed_shared(name[1], state, policies, now_us=now_us, price_book=price_book)
            effects = unsaid(effects, state.fuses, before, self._said(name[1]))
            if effects is not None:
                self._dirty.add(name)
                self._deliveries += await self._publisher.effects(effects)

    def _take_remaining(self) -> list[Remaining]:
        now_us = self._clock()
        policies = self._feed.policies
        left: list[Remaining] = []
        for name in self._board.take(now_us):
            scope, state = name[1], self._state(*name)
            as_of_ms = self._as_of_ms.get(name, -1)
            found = remaining_shared(scope, state, policies, now_us=now_us, as_of_ms=as_of_ms)
            left += self._board.publish(name, found, now_us)
            rolls_us = rolls_at(policies.of(scope), merged(part.spend for part in state.parts.values()), now_us)
            if rolls_us is not None:
                self._due.watch(state_key(*name).decode(), rolls_us)
        return left

    async def flush(self) -> None:
        """Make what was taken in durable, then acknowledge it."""
        async with self._flushing:
            async with self._changing:
                self._drop_if_reassigned()
                generation = self._current
                await self._look_again()
                unacked, self._unacked = self._unacked, []
                deliveries, self._deliveries = self._deliveries, []
                dirty, self._dirty = self._dirty, set()
                # In one step: what is written is what led to `deliveries`, and nothing later.
                writes = [(key, encode_shared(self._states[key])) for key in dirty]
                left = self._take_remaining()
                idle = self._take_idle(dirty)
            if not (unacked or deliveries or writes or left or idle):
                return
            deliveries += [await self._publisher.remaining(each) for each in left]
            await asyncio.gather(*deliveries)
            if generation != self._generation():
                return
            written = [self._table.write(key[0], state_key(*key), value) for key, value in writes]
            # Unless it has been needed again meanwhile.
            gone = [self._table.delete(name[0], state_key(*name)) for name in idle if name not in self._states]
            await asyncio.gather(*written, *gone)
            if generation == self._generation():
                for record in unacked:
                    record.ack()
            if len(self._states) > STATES_MAX:
                self._states = {key: self._states[key] for key in self._dirty}
                self._as_of_ms = {key: at for key, at in self._as_of_ms.items() if key in self._states}

    def _take_idle(self, written: set[Name]) -> list[Name]:
        """Return scopes that may be forgotten, of the next few; they are dropped from memory."""
        now_us = self._clock()
        idle = []
        for name in self._sweep.take(now_us):
            value = self._table.get(state_key(*name))
            if value is None or name in written or name[0] not in self._ours:
                continue
            state = self._states.get(name) or decode_shared(value)
            if shared_is_idle(name[1], state, self._feed.policies, now_us, self._idle_us):
                self._states.pop(name, None)
                self._as_of_ms.pop(name, None)
                idle.append(name)
        return idle

    async def heal(self, owned: set[int]) -> None:
        """Write again what a recovery found overwritten by older states, on the partitions owned."""
        async with self._flushing:
            await asyncio.gather(*self._table.heal(owned))

    async def reconsider(self, owned: set[int]) -> None:
        """Judge every shared scope of the partitions owned again, after budgets changed.

        It ends when the partitions are assigned anew: then it is called again, for the partitions owned by then.
        """
        generation = self._generation()
        for nth, key in enumerate(self._table.keys()):
            partition, scope = split_state_key(key)
            if partition in owned:
                async with self._changing:
                    if generation != self._generation():
                        return
                    self._drop_if_reassigned()
                    self._ours.add(partition)
                    await self._reconsider_scope(partition, scope)
            if nth % RECONSIDER_SLICE == 0:
                await asyncio.sleep(0)  # a trip meanwhile must not wait for the end of the list

    async def _reconsider_scope(self, partition: int, scope: str) -> None:
        name = (partition, scope)
        in_use = name in self._states
        state, now_us = self._state(partition, scope), self._clock()
        recalled = recall_unknown(scope, state.fuses, self._feed.policies, self._said, now_us)
        before = sequences_of(state.fuses)
        effects = reconsider_shared(
            scope, state, self._feed.policies, now_us=now_us, price_book=self._feed.book.version
        )
        effects = unsaid(effects, state.fuses, before, self._said(scope))
        self._watch(name, state, now_us)
        if self._feed.policies.of(scope).limits or self._board.knows(name):
            self._board.touch(name)
        if recalled:
            self._dirty.add(name)
        if effects is not None:
            self._dirty.add(name)
            self._deliveries += await self._publisher.effects(effects)
        elif not in_use and not recalled:
            del self._states[name]  # looked at, and no more: not all that is stored fits into memory

    def _state(self, partition: int, scope: str) -> SharedState:
        key = (partition, scope)
        state = self._states.get(key)
        if state is None:
            value = self._table.get(state_key(partition, scope))
            state = self._states[key] = SharedState() if value is None else decode_shared(value)
        return state

    def _drop_if_reassigned(self) -> None:
        generation = self._generation()
        if generation != self._current:
            self._states, self._dirty, self._unacked, self._deliveries = {}, set(), [], []
            self._board, self._due, self._as_of_ms = Board(), Due(), {}
            self._sweep, self._ours = Sweep(self._table.keys), set()
            self._current = generation


def _is_plausible(rollup: Rollup, value: bytes) -> bool:
    """Say whether a meter can have written it: else it would stop the partition, now or when it is next judged."""
    if _BEYOND_64_BITS.search(value):
        return False
    try:
        if any(window_of_key(key).key != key for key in rollup.windows):
            return False
    except (ArithmeticError, LookupError, ValueError):  # no such zone, or no such year
        return False
    return all(
        rolling_s >= ROLLING_SLOTS and 0 <= slot <= slot_of(rolling_s, LAST_US)
        for rolling_s, slots in rollup.rolling.items()
        for slot in slots
    )
