"""The meter's shell: packed messages in; commands at once, everything else durable before the source is acked.

Order of durability: ledger, rollups and commands first, then the state (changelog), then the acknowledgement. So a
state that says "seen" implies that all it led to is on the broker.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from pydantic import ValidationError

from spendfuse.client.clock import Clock
from spendfuse.engine.again import Said, recall_unknown, sequences_of, unsaid
from spendfuse.engine.call import Call
from spendfuse.engine.correct import correct
from spendfuse.engine.idle import bound_us, scope_is_idle
from spendfuse.engine.ids import SLOTS, SeenIds
from spendfuse.engine.meter import Outcome, PartitionMeter
from spendfuse.engine.state import ScopeState
from spendfuse.pipeline import quick
from spendfuse.pipeline.board import Board
from spendfuse.pipeline.codec import UnreadableStateError, decode_scope, encode_scope, restore_slot
from spendfuse.pipeline.feed import PolicyFeed
from spendfuse.pipeline.intake import CORRECTIONS_HEAD, reason
from spendfuse.pipeline.ledger_text import charged_texts, entry_texts
from spendfuse.pipeline.publish import Publisher
from spendfuse.pipeline.records import Delivery, SourceRecord, Table
from spendfuse.pipeline.refusal import Ends
from spendfuse.pipeline.routing import split_state_key, state_key
from spendfuse.pipeline.sweep import Sweep
from spendfuse.pipeline.violations import Violations
from spendfuse.wire.base import encode, from_us
from spendfuse.wire.control import Command
from spendfuse.wire.correction import PackedCorrections
from spendfuse.wire.ledger import LedgerEntry
from spendfuse.wire.packed import Packed
from spendfuse.wire.remaining import Remaining
from spendfuse.wire.rollup import Rollup
from spendfuse.wire.scopes import scope_kind
from spendfuse.wire.topics import USAGE

UNACKED_MAX: Final = 500
"""Most packed messages whose effects are not yet durable; at this many the meter flushes before it reads on."""
STATES_MAX: Final = 50_000
"""Most scopes a worker keeps decoded; beyond it, half of them are dropped, and read back when they are needed."""
IDLE_US: Final = bound_us(35, 7 * 86_400)
RECONSIDER_SLICE: Final = 200


class MeterTables(NamedTuple):
    """The meter's tables: sums by scope, and remembered ids by slot of the ring."""

    scopes: Table
    ids: Table


_Write = tuple[Table, int, bytes, bytes]


@dataclass(slots=True)
class _Pending:
    """What has happened on one partition since the last flush."""

    meter: PartitionMeter
    as_of: int = -1
    dirty: set[str] = field(default_factory=set)
    unpublished: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Counters:
    """What the meter has done since it started."""

    usages: int = 0
    messages: int = 0
    replays: int = 0
    duplicates: int = 0
    commands: int = 0
    flushes: int = 0


class MeterStage:
    """The meter of one worker, over all the packed partitions it owns at the moment."""

    def __init__(
        self,
        *,
        tables: MeterTables,
        publisher: Publisher,
        feed: PolicyFeed,
        clock: Clock,
        generation: Callable[[], int],
        violations: Violations,
        ends: Ends | None = None,
        idle_us: int = IDLE_US,
        said: Said = lambda _: (),
    ) -> None:
        """Take the ports; `generation` changes whenever partitions are assigned anew; `ends` vouches for the state.

        A scope is forgotten after `idle_us`. `said` knows what was commanded, by whatever worker.
        """
        self.counters = Counters()
        self._idle_us = idle_us
        self._said = said
        self._sweep = Sweep(tables.scopes.keys)
        self._ends = ends
        self._tables = tables
        self._publisher = publisher
        self._feed = feed
        self._clock = clock
        self._generation = generation
        self._violations = violations
        self._current = generation()
        self._partitions: dict[int, _Pending] = {}
        self._vouched: set[int] = set()
        self._unacked: list[SourceRecord] = []
        self._deliveries: list[Delivery] = []
        self._board = Board()
        self._flushing = asyncio.Lock()
        # Held from the change of a state until all it led to is handed over: a flush in between would make the state
        # durable without its commands and ledger entries, and a crash would lose them.
        self._changing = asyncio.Lock()

    async def on_record(self, record: SourceRecord) -> None:
        """Fold one packed message into the state; flush when too much is not yet durable."""
        generation = self._generation()
        async with self._changing:
            if generation != self._generation():
                return  # it waited while its partition was given away: what is stored here may be old by now
            self._drop_if_reassigned()
            self._deliveries += await self._take_in(record)
            self._unacked.append(record)
        if len(self._unacked) >= UNACKED_MAX:
            await self.flush()

    async def _take_in(self, record: SourceRecord) -> list[Delivery]:
        value = record.value or b""
        calls = quick.calls(value)
        if calls is None:
            if value.startswith(CORRECTIONS_HEAD):
                return await self._correct(record, value)
            try:
                calls = [Call.of(each) for each in Packed.model_validate_json(value).usages]
            except ValidationError as error:
                return [await self._publisher.dead_letter(record, reason(error))]
        pending = self._pending(record.partition)
        await self._vouch(record.partition, pending)
        now_us = self._clock()
        outcome = pending.meter.apply(calls, self._feed.policies, self._feed.book, now_us)
        pending.dirty |= outcome.touched
        pending.unpublished |= outcome.touched
        pending.as_of = record.offset
        self._count(outcome, len(calls))
        # Commands leave before anything else is done with this message.
        deliveries = await self._publisher.effects(outcome.effects)
        entries = charged_texts(outcome.charged) + entry_texts(_decisions(outcome.effects.shadow, record, now_us))
        title = f"{record.partition}/{record.offset}"
        deliveries += await self._publisher.ledger(record.partition, title, entries, now_us)
        for alert in self._violations.on_charges(outcome.charged, now_us):
            deliveries.append(await self._publisher.alert(alert))
        return deliveries

    async def _correct(self, record: SourceRecord, value: bytes) -> list[Delivery]:
        """Take in a message of corrections, as one of usages."""
        try:
            items = PackedCorrections.model_validate_json(value).corrections
        except ValidationError as error:
            return [await self._publisher.dead_letter(record, reason(error))]
        pending = self._pending(record.partition)
        await self._vouch(record.partition, pending)
        now_us = self._clock()
        outcome = correct(pending.meter, items, self._feed.policies, self._feed.book, now_us)
        pending.dirty |= outcome.touched
        pending.unpublished |= outcome.touched
        pending.as_of = record.offset
        self.counters.messages += 1
        self.counters.replays += outcome.replays
        self.counters.commands += len(outcome.effects.commands)
        deliveries = await self._publisher.effects(outcome.effects)
        entries = outcome.entries + _decisions(outcome.effects.shadow, record, now_us)
        title = f"{record.partition}/{record.offset}"
        deliveries += await self._publisher.ledger(record.partition, title, entry_texts(entries), now_us)
        for item, fault in outcome.refused:
            path = item.c.agent_path.encode()
            origin = SourceRecord(USAGE.name, item.p, item.o, item.t, path, encode(item.c))
            deliveries.append(await self._publisher.dead_letter(origin, f"correction: {fault}"))
        return deliveries

    async def publish_rollups(self) -> None:
        """Publish the shares of scopes that have a cap, so that it is judged soon; the others go with the flush."""
        async with self._changing:
            self._drop_if_reassigned()
            for pending in self._partitions.values():
                capped = {scope for scope in pending.unpublished if self._feed.policies.of(scope).limits}
                pending.unpublished -= capped
                self._deliveries += await self._publish(pending, capped)

    async def _publish(self, pending: _Pending, scopes: set[str]) -> list[Delivery]:
        now_us = self._clock()
        shares = [pending.meter.rollup(scope, pending.as_of, now_us) for scope in scopes]
        return [await self._publisher.rollup(share) for share in shares if share is not None]

    async def flush(self) -> None:
        """Make everything since the last flush durable, then acknowledge its source."""
        async with self._flushing:
            async with self._changing:
                self._drop_if_reassigned()
                generation = self._current
                await self._look_again()
                unacked, self._unacked = self._unacked, []
                deliveries, self._deliveries = self._deliveries, []
                # In one step: what is written is what led to `deliveries`, and nothing later.
                rollups, writes = self._take_dirty()
                idle = self._take_idle({(partition, key) for _, partition, key, _ in writes})
                deliveries += [await self._publisher.rollup(rollup) for rollup in rollups]
                left = self._take_remaining()
            if not (unacked or deliveries or writes or left or idle):
                return
            deliveries += [await self._publisher.remaining(each) for each in left]
            await asyncio.gather(*deliveries)
            if generation != self._generation():
                return  # no longer ours: the new owner reads it again, and writes it
            written = [table.write(partition, key, value) for table, partition, key, value in writes]
            await asyncio.gather(*written, *self._forget(idle))
            if generation == self._generation():
                for record in unacked:
                    record.ack()
            self.counters.flushes += 1
            self._bound()

    def _take_idle(self, written: set[tuple[int, bytes]]) -> list[tuple[int, str]]:
        """Return scopes that may be forgotten, of the next few; they are dropped from memory."""
        now_us = self._clock()
        idle = []
        for partition, scope in self._sweep.take(now_us):
            pending, key = self._partitions.get(partition), state_key(partition, scope)
            value = self._tables.scopes.get(key)
            if pending is None or value is None or (partition, key) in written:
                continue
            state = pending.meter.states.get(scope) or decode_scope(value)
            if scope_is_idle(scope, state, self._feed.policies, now_us, self._idle_us):
                pending.meter.forget(scope)
                idle.append((partition, scope))
        return idle

    def _forget(self, idle: list[tuple[int, str]]) -> list[Delivery]:
        """Delete what was idle from the table, unless it has been needed again meanwhile."""
        return [
            self._tables.scopes.delete(partition, state_key(partition, scope))
            for partition, scope in idle
            if scope not in self._partitions[partition].meter.states
        ]

    def _bound(self) -> None:
        decoded = sum(len(pending.meter.states) for pending in self._partitions.values())
        if decoded <= STATES_MAX:
            return
        excess = decoded - STATES_MAX // 2
        for pending in self._partitions.values():
            # Those loaded first. What was touched while the flush waited is not in the table yet, so it stays.
            written = [scope for scope in pending.meter.states if scope not in pending.dirty]
            for scope in written[: max(0, excess)]:
                pending.meter.forget(scope)
            excess -= len(written)

    def _take_dirty(self) -> tuple[list[Rollup], list[_Write]]:
        now_us = self._clock()
        rollups: list[Rollup] = []
        writes: list[_Write] = []
        policies = self._feed.policies
        for partition, pending in self._partitions.items():
            shares = (pending.meter.rollup(scope, pending.as_of, now_us) for scope in pending.unpublished)
            rollups += [share for share in shares if share is not None]
            pending.unpublished.clear()
            for scope in pending.dirty:
                if scope_kind(scope) == "agent" and policies.of(scope).limits:
                    self._board.touch((partition, scope))
                value = encode_scope(pending.meter.state(scope))
                writes.append((self._tables.scopes, partition, state_key(partition, scope), value))
            for slot, value in pending.meter.seen.take_dirty().items():
                writes.append((self._tables.ids, partition, state_key(partition, str(slot)), value))
            pending.dirty.clear()
        return rollups, writes

    async def _look_again(self) -> None:
        """Judge the scopes about which time alone changed something: deadlines of calls in flight, rolling sums."""
        now_us = self._clock()
        for partition, pending in self._partitions.items():
            for scope in pending.meter.due.take(now_us):
                fuses = pending.meter.state(scope).fuses
                before = sequences_of(fuses)
                effects = pending.meter.passed(scope, self._feed.policies, self._feed.book, now_us)
                effects = unsaid(effects, fuses, before, self._said(scope))
                pending.dirty.add(scope)
                pending.unpublished.add(scope)
                self._board.touch((partition, scope))
                if effects is not None:
                    self._deliveries += await self._publisher.effects(effects)
                    self.counters.commands += len(effects.commands)

    def _take_remaining(self) -> list[Remaining]:
        now_us = self._clock()
        left: list[Remaining] = []
        for partition, scope in self._board.take(now_us):
            found = self._pending(partition).meter.remaining(scope, self._feed.policies, now_us)
            left += self._board.publish((partition, scope), found, now_us)
        return left

    async def heal(self, owned: set[int]) -> None:
        """Write again what a recovery found overwritten by older states, on the partitions owned."""
        async with self._flushing:
            await asyncio.gather(*self._tables.scopes.heal(owned), *self._tables.ids.heal(owned))

    async def reconsider(self, owned: set[int]) -> None:
        """Judge every agent of the partitions owned again, after budgets or prices changed.

        It ends when the partitions are assigned anew: then it is called again, for the partitions owned by then.
        """
        generation = self._generation()
        for nth, key in enumerate(self._tables.scopes.keys()):
            partition, scope = split_state_key(key)
            if partition in owned and scope.startswith("agent:"):
                async with self._changing:
                    if generation != self._generation():
                        return
                    self._drop_if_reassigned()
                    await self._reconsider_agent(partition, scope)
            if nth % RECONSIDER_SLICE == 0:
                await asyncio.sleep(0)  # a command that trips meanwhile must not wait for the end of the list

    async def _reconsider_agent(self, partition: int, scope: str) -> None:
        pending = self._pending(partition)
        in_use = scope in pending.meter.states
        fuses = pending.meter.state(scope).fuses
        recalled = recall_unknown(scope, fuses, self._feed.policies, self._said, self._clock())
        before = sequences_of(fuses)
        effects = pending.meter.reconsider(scope, self._feed.policies, self._feed.book, self._clock())
        effects = unsaid(effects, fuses, before, self._said(scope))
        pending.meter.watch(scope)
        if self._feed.policies.of(scope).limits or self._board.knows((partition, scope)):
            self._board.touch((partition, scope))
        if recalled:
            pending.dirty.add(scope)
        if effects is not None:
            pending.dirty.add(scope)
            self._deliveries += await self._publisher.effects(effects)
            self.counters.commands += len(effects.commands)
        elif not in_use and not recalled:
            pending.meter.forget(scope)  # looked at, and no more: not all that is stored fits into memory

    def _drop_if_reassigned(self) -> None:
        generation = self._generation()
        if generation != self._current:
            self._partitions, self._unacked, self._deliveries, self._vouched = {}, [], [], set()
            self._board, self._sweep = Board(), Sweep(self._tables.scopes.keys)
            self._current = generation

    def _pending(self, partition: int) -> _Pending:
        pending = self._partitions.get(partition)
        if pending is None:
            pending = self._partitions[partition] = _Pending(self._open(partition))
        return pending

    async def _vouch(self, partition: int, pending: _Pending) -> None:
        """Raise `StateMismatchError` when what the partition remembers lies beyond the end of `usage.v1`."""
        if self._ends is None or partition in self._vouched:
            return
        for origin, offset in pending.meter.seen.reached().items():
            await self._ends.vouch(USAGE.name, origin, offset)
        self._vouched.add(partition)

    def _open(self, partition: int) -> PartitionMeter:
        def load(scope: str) -> ScopeState | None:
            value = self._tables.scopes.get(state_key(partition, scope))
            return None if value is None else decode_scope(value)

        seen = SeenIds()
        for slot in range(SLOTS):
            value = self._tables.ids.get(state_key(partition, str(slot)))
            if value is not None:
                try:
                    restore_slot(seen, value)
                except UnreadableStateError as error:
                    raise UnreadableStateError(f"slot {slot} of partition {partition}: {error}") from error
        return PartitionMeter(partition, load, seen)

    def _count(self, outcome: Outcome, usages: int) -> None:
        counters = self.counters
        counters.messages += 1
        counters.usages += usages
        counters.replays += outcome.replays
        counters.duplicates += outcome.duplicates
        counters.commands += len(outcome.effects.commands)


def _decisions(shadow: list[Command], record: SourceRecord, now_us: int) -> list[LedgerEntry]:
    """Return what was decided and not sent, as entries of the packed message that led to it."""
    return [
        LedgerEntry.model_construct(
            kind="decision",
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            index=nth,
            at=from_us(now_us),
            late=False,
            command=command,
        )
        for nth, command in enumerate(shadow)
    ]
