"""The pipeline without a broker: bytes in, bytes out, the very stages of production, and a clock that you set.

In the way of Kafka Streams' TopologyTestDriver: every call returns when everything that follows from it has happened.
"""

import asyncio
import weakref
from collections.abc import Callable, Coroutine, Iterable, Sequence
from datetime import datetime, timedelta
from functools import cache
from typing import Any, Final, NamedTuple, TypeVar

from aiokafka.partitioner import murmur2

from spendfuse.adapters import price_book_file
from spendfuse.client.follow import Record
from spendfuse.client.keys import PublicKey, Signer, Verifier, parse_public_keys
from spendfuse.engine.crossings import Held
from spendfuse.engine.idle import bound_us
from spendfuse.engine.rollup import held_by
from spendfuse.engine.spend import Spend, merged
from spendfuse.engine.state import Fuse
from spendfuse.engine.wallet import WalletRow, wallet_rows
from spendfuse.engine.windows import RUN_KEY, calendar_window
from spendfuse.pipeline import recorder
from spendfuse.pipeline.codec import decode_scope, decode_shared
from spendfuse.pipeline.feed import PolicyFeed, budget_key
from spendfuse.pipeline.intake import Limits, rounds
from spendfuse.pipeline.meter import MeterStage, MeterTables
from spendfuse.pipeline.proofs import GuardKeys
from spendfuse.pipeline.publish import Publisher
from spendfuse.pipeline.records import Headers, SourceRecord
from spendfuse.pipeline.refusal import Ends
from spendfuse.pipeline.register import Register
from spendfuse.pipeline.rollup import RollupStage
from spendfuse.pipeline.routing import partition_of, split_state_key, state_key
from spendfuse.pipeline.violations import Violations
from spendfuse.settings import WorkerSettings
from spendfuse.testing.memory import (
    ChangelogRecord,
    MemoryOutbox,
    MemoryReader,
    MemoryTable,
    MemoryTopics,
    Power,
    PowerCutError,
)
from spendfuse.wire.base import encode, from_us, to_us
from spendfuse.wire.budget import Budget, WindowSpec, WorkspaceSettings
from spendfuse.wire.control import Alert, Command
from spendfuse.wire.correction import Correction, TokenDifferences
from spendfuse.wire.ledger import LedgerBatch, LedgerEntry
from spendfuse.wire.packed import INDEX_BITS
from spendfuse.wire.prices import PriceBookFile, PriceOverride
from spendfuse.wire.scopes import scope_kind, scope_workspace
from spendfuse.wire.signing import SIGNATURE_HEADER
from spendfuse.wire.topics import ALERTS, BUDGETS, COMMANDS, DEAD_LETTERS, LEDGER, PACKED, PRICES, ROLLUPS, USAGE
from spendfuse.wire.usage import Tokens, Usage, UsagePack

START_US: Final = 1_767_603_600_000_000
"""Monday 2026-01-05T09:00:00Z: where the clock of a driver starts unless it is told."""
US_PER_MS: Final = 1_000
SECOND_US: Final = 1_000_000
RECORDS_PER_READ: Final = 500
STATE_IDLE_DAYS: Final = int(WorkerSettings.model_fields["state_idle_days"].default)
STEPS_MAX: Final = 100_000
"""Most reads until everything has happened: more is a loop."""
EMITTER: Final = "spendfuse-testing"
_POSITIVE: Final = 0x7FFFFFFF

_T = TypeVar("_T")


class DeadLetterRow(NamedTuple):
    """Something refused: why, where it came from, its place in a packed message, and its bytes."""

    reason: str
    topic: str
    partition: int
    offset: int
    nth: int
    value: bytes


class SpendRow(NamedTuple):
    """What a scope spent in a window: nano-units of the price book's currency, tokens, and calls."""

    nanos: int
    tokens: int
    calls: int


class _Money(NamedTuple):
    spend: Spend
    held: Held
    fuses: dict[str, Fuse]


class PipelineDriver:
    """Runs intake, meter, rollup and recorder over topics in memory. Call it from synchronous code.

    >>> from spendfuse.testing import PipelineDriver
    >>> from spendfuse.wire import Budget, Cap, WindowSpec
    >>> ten_dollars = Cap(id="day-usd", unit="nano-USD", amount=10_000_000_000, window=WindowSpec(kind="day"))
    >>> driver = PipelineDriver(budgets=[Budget(id="agents", version=1, scope="agent:acme/*/*", caps=[ten_dollars])])
    >>> for _ in range(3):
    ...     driver.emit(driver.usage("acme/research/planner", model="claude-opus-4-1", output=50_000))
    >>> [command.action for command in driver.commands()]
    ['halt']
    >>> driver.spend("agent:acme/research/planner").tokens
    150000
    >>> driver.advance(hours=24)
    >>> [(row.cap, row.state) for row in driver.wallet()]
    [('day-usd', 'armed')]

    `start` is the clock's first instant (a datetime, or microseconds since the epoch); it moves only by `advance` and
    `at`. `price_book` is the one that ships unless given; `signing_key` (`kid=base64`, see `client.keys`) signs the
    commands, which go unsigned without one; `public_keys` are further keys whose commands are genuine, `guard_keys`
    those that prove acks. With `autoflush=False` what a worker keeps in memory between two flushes (100 ms) stays there
    until `flush`, so that `crash` has something to lose. A scope is forgotten after
    `state_idle_days`, as a worker's setting has it.
    """

    def __init__(
        self,
        *,
        budgets: Iterable[Budget | WorkspaceSettings] = (),
        partitions: int = 4,
        start: datetime | int = START_US,
        price_book: PriceBookFile | None = None,
        signing_key: str | None = None,
        public_keys: str = "",
        guard_keys: str = "",
        autoflush: bool = True,
        state_idle_days: int = STATE_IDLE_DAYS,
    ) -> None:
        """Start a worker on empty topics and apply the budgets."""
        settings = WorkerSettings.from_env({}, partitions=partitions, state_idle_days=state_idle_days)
        self._idle_us = bound_us(settings.state_idle_days, settings.usage_age_max_s)
        self.partitions = settings.partitions
        self.now_us = start if isinstance(start, int) else to_us(start)
        self.changelog: list[ChangelogRecord] = []
        self._autoflush = autoflush
        self._limits = Limits(settings.usage_age_max_s * SECOND_US, settings.usage_ahead_max_s * SECOND_US)
        self._price_book = price_book or _shipped_book()
        self._signer = Signer.parse(signing_key) if signing_key else None
        self._public_keys = parse_public_keys(public_keys) if public_keys else {}
        self._guard_keys = GuardKeys.parse(guard_keys)
        self._violation_grace_us = int(settings.violation_grace_s * SECOND_US)
        self._topics = MemoryTopics(self.partitions)
        self._power = Power()
        self._generation = 1
        self._usages = 0
        self._meanwhile: Callable[[], None] | None = None
        self._is_down = False
        self._loop = asyncio.new_event_loop()
        weakref.finalize(self, self._loop.close)
        self._intake_reader = MemoryReader(self._topics, [USAGE.name])
        self._meter_reader = MemoryReader(self._topics, [PACKED.name])
        self._rollup_reader = MemoryReader(self._topics, [ROLLUPS.name])
        self._recorder_reader = MemoryReader(self._topics, [topic.name for topic in recorder.RECORDED])
        self._start()
        for budget in budgets:
            self.apply_budget(budget)

    # -- what goes in ----------------------------------------------------------------------------------------------

    @property
    def now(self) -> datetime:
        """Return what the clock says."""
        return from_us(self.now_us)

    def usage(self, agent_path: str, **fields: Any) -> Usage:
        """Return a usage of `workspace/team/agent` now, with a new id; token counters may be given by their names.

        The other fields are those of `Usage`; without them it is a finished call of anthropic/claude-sonnet-4-5.
        """
        workspace, team, agent = agent_path.split("/")
        self._usages += 1
        counters = {name: fields.pop(name) for name in Tokens.model_fields if name in fields}
        defaults: dict[str, Any] = {
            "id": f"call-{self._usages}",
            "ts": self.now,
            "run": f"run-{agent}"[:128],
            "provider": "anthropic",
            "model": "claude-sonnet-4-5",
            "tokens": Tokens(**counters),
        }
        return Usage(workspace=workspace, team=team, agent=agent, **(defaults | fields))

    def emit(
        self,
        usage: Usage | Sequence[Usage] | bytes | None,
        *,
        partition: int | None = None,
        key: bytes | None = None,
        timestamp_ms: int | None = None,
    ) -> None:
        """Put one record on `usage.v1`: a usage, a pack of them, any bytes, or None for a record without a value.

        Without `partition` it goes where a Kafka client's default partitioner puts its key, which is the agent's path
        unless given. Raises `ValueError` for what Kafka would not take.
        """
        if isinstance(usage, Usage):
            value: bytes | None = encode(usage)
            key = usage.agent_path.encode() if key is None else key
        elif usage is None or isinstance(usage, bytes):
            value = usage
        else:
            value = encode(UsagePack(usages=list(usage)))
            key = usage[0].agent_path.encode() if key is None else key
        if partition is None:
            partition = (murmur2(key or b"") & _POSITIVE) % self.partitions
        self.put(USAGE.name, value, key=key, partition=partition, timestamp_ms=timestamp_ms)

    def correct(self, usage: Usage, correction_id: str, **differences: Any) -> None:
        """Put a correction of a usage on `usage.v1`, signed with the driver's key when it has one.

        Differences of token counters by their names, `cost_nanos`, and the other fields of `Correction`.
        """
        counters = {name: differences.pop(name) for name in TokenDifferences.model_fields if name in differences}
        same = ("workspace", "team", "agent", "run", "root_run", "parent_run", "workflow", "provider", "model", "tier")
        fields: dict[str, Any] = {name: getattr(usage, name) for name in same} | {
            "type": "correction", "id": correction_id, "usage_id": usage.id, "ts": usage.ts, "at": self.now,
            "tags": usage.tags, "currency": self._feed.book.currency, "reason": "manual", "by": "driver",
            "tokens": TokenDifferences(**counters),
        }  # fmt: skip
        correction = Correction(**(fields | differences))
        key, value = correction.agent_path.encode(), encode(correction)
        partition = (murmur2(key) & _POSITIVE) % self.partitions
        headers = [] if self._signer is None else [(SIGNATURE_HEADER, self._signer.sign(USAGE.name, key, value))]
        self.put(USAGE.name, value, key=key, partition=partition, headers=headers)

    def apply_budget(self, budget: Budget | WorkspaceSettings) -> None:
        """Put a budget in force, or another version of it, or a workspace's time zone."""
        self.put(BUDGETS.name, encode(budget), key=budget_key(budget).encode())

    def withdraw_budget(self, budget_id: str) -> None:
        """Take a budget out of force."""
        self.put(BUDGETS.name, None, key=budget_id.encode())

    def price(self, override: PriceOverride) -> None:
        """Put a price override in force."""
        self.put(PRICES.name, encode(override), key=override.id.encode())

    def withdraw_price(self, override_id: str) -> None:
        """Take a price override out of force."""
        self.put(PRICES.name, None, key=override_id.encode())

    def put(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        partition: int = 0,
        headers: Headers = (),
        timestamp_ms: int | None = None,
    ) -> None:
        """Put any record on any topic, as somebody outside would.

        Raises `ValueError` for a topic or partition that does not exist, or a record that Kafka would not take.
        """
        at_ms = self.now_us // US_PER_MS if timestamp_ms is None else timestamp_ms
        self._topics.append(topic, partition, key=key, value=value, headers=headers, timestamp_ms=at_ms)
        self._drive()

    # -- time, and what befalls a process --------------------------------------------------------------------------

    def advance(self, seconds: int = 0, *, minutes: int = 0, hours: int = 0, days: int = 0) -> None:
        """Move the clock forward."""
        self.at(self.now_us + timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds) // _MICROSECOND)

    def at(self, instant: datetime | int) -> None:
        """Move the clock forward to an instant (a datetime, or microseconds since the epoch).

        Raises `ValueError` for one in the past.
        """
        to = instant if isinstance(instant, int) else to_us(instant)
        if to < self.now_us:
            raise ValueError(f"the clock is at {self.now.isoformat()} and cannot go back to {from_us(to).isoformat()}")
        self.now_us = to
        self._drive()

    def flush(self) -> None:
        """Make all that is in memory durable and acknowledge its source; with `autoflush` this happens by itself."""
        self._until_powered(self._flush)

    def crash(self, after_records: int | None = None, *, meanwhile: Callable[[], None] | None = None) -> None:
        """Kill the worker and start it again: what was not durable is lost, what was not acknowledged comes again.

        With `after_records` it dies later: when so many more records, changelog included, have left it. `meanwhile` is
        called while no worker runs.
        """
        self._meanwhile = meanwhile or self._meanwhile
        if after_records is not None:
            self._power.left = after_records
            return
        self._restart()
        self._drive()

    def reassign(self) -> None:
        """Take all partitions away and give them back, as a rebalance does: nothing unwritten may survive it."""
        self._generation += 1
        self._meter_reader.rewind()
        self._rollup_reader.rewind()
        self._drive()

    # -- what comes out --------------------------------------------------------------------------------------------

    def records(self, topic: str) -> list[SourceRecord]:
        """Return the records of a topic as they lie there, partition by partition."""
        return self._topics.records(topic)

    def commands(self) -> list[Command]:
        """Return the commands, in order."""
        return [Command.model_validate_json(record.value or b"") for record in self.records(COMMANDS.name)]

    def alerts(self) -> list[Alert]:
        """Return the alerts, in order."""
        return [Alert.model_validate_json(record.value or b"") for record in self.records(ALERTS.name)]

    def dead_letters(self) -> list[DeadLetterRow]:
        """Return what was refused, in order; a number that somebody else's record does not give is -1."""
        rows = []
        for record in self.records(DEAD_LETTERS.name):
            said = dict(record.headers)
            rows.append(
                DeadLetterRow(
                    said.get("spendfuse-reason", b"").decode("utf-8", "replace"),
                    said.get("spendfuse-topic", b"").decode("utf-8", "replace"),
                    _whole(said.get("spendfuse-partition")),
                    _whole(said.get("spendfuse-offset")),
                    _whole(said.get("spendfuse-index")),
                    record.value or b"",
                )
            )
        return rows

    def ledger(self, *, trimmed: bool = True) -> list[LedgerEntry]:
        """Return the ledger's entries; `trimmed` leaves out repetitions after a crash, by origin, as the audit does."""
        entries = []
        reached: dict[tuple[int, str, int], int] = {}
        for record in self.records(LEDGER.name):
            for entry in LedgerBatch.model_validate_json(record.value or b"").entries:
                origin = (record.partition, entry.topic, entry.partition)
                position = (entry.offset << INDEX_BITS) | entry.index
                if not trimmed or position > reached.get(origin, -1):
                    reached[origin] = max(position, reached.get(origin, -1))
                    entries.append(entry)
        return entries

    def spend(self, scope: str, window: WindowSpec | str = "day", *, timezone: str | None = None) -> SpendRow:
        """Return what a scope has spent in the running window, as of the last flush; zeros for one never seen.

        `window` is hour, day, week, month or run, or a `WindowSpec`; the zone is the workspace's unless given. Windows
        other than hour, day, month and run are kept from when a budget asks for them.
        """
        spec = WindowSpec.model_validate({"kind": window}) if isinstance(window, str) else window
        spend = self._money(scope).spend
        if spec.rolling_s is not None:
            return SpendRow(*spend.in_rolling(spec.rolling_s, self.now_us))
        zone = timezone or self._zone(scope)
        key = RUN_KEY if spec.kind == "run" else calendar_window(spec.kind, zone, self.now_us).key
        return SpendRow(*spend.in_window(key))

    def wallet(self) -> list[WalletRow]:
        """Return a row for each cap of each scope seen, as of the last flush, in the order of the scopes' names."""
        agents = {split_state_key(key)[1] for key in self._meter_tables.scopes.keys()}  # noqa: SIM118 - a table, not a dict
        shared = {split_state_key(key)[1] for key in self._shared_table.keys()}  # noqa: SIM118 - the same
        rows = []
        for scope in sorted({scope for scope in agents if scope_kind(scope) == "agent"} | shared):
            spend, held, fuses = self._money(scope)
            policy = self._feed.policies.of(scope)
            rows += wallet_rows(scope, policy, spend, held, fuses, zone=self._zone(scope), now_us=self.now_us)
        return rows

    def _money(self, scope: str) -> _Money:
        if scope_kind(scope) != "agent":
            value = self._shared_table.get(state_key(partition_of(scope, self.partitions), scope))
            if value is None:
                return _Money(Spend(), Held(), {})
            shared = decode_shared(value)
            return _Money(
                merged(part.spend for part in shared.parts.values()), held_by(shared, self.now_us), shared.fuses
            )
        partition = partition_of(scope.partition(":")[2], self.partitions)
        value = self._meter_tables.scopes.get(state_key(partition, scope))
        if value is None:
            return _Money(Spend(), Held(), {})
        state = decode_scope(value)
        return _Money(state.spend, Held(*state.spend.held(self.now_us)), state.fuses)

    def _zone(self, scope: str) -> str:
        return self._feed.policies.zones.get(scope_workspace(scope), "UTC")

    # -- the worker ------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Make a worker that knows nothing but what is durable."""
        self._judge_again = True
        self._feed = PolicyFeed(self._price_book, on_change=self._on_change)
        self._feed_reader = MemoryReader(self._topics, [BUDGETS.name, PRICES.name])
        self._command_reader = MemoryReader(self._topics, [COMMANDS.name])
        self._register = Register(self._verifier(), self._guard_keys)
        outbox = MemoryOutbox(self._topics, self._power, lambda: self.now_us // US_PER_MS)
        self._publisher = Publisher(outbox, self._signer, self.partitions)
        self._tables()
        ports: dict[str, Any] = {
            "publisher": self._publisher,
            "feed": self._feed,
            "clock": lambda: self.now_us,
            "generation": lambda: self._generation,
            "ends": Ends(self._end_of, 0.0),
            "idle_us": self._idle_us,
            "said": self._register.of_scope,
        }
        violations = Violations(self._register.halts, self._violation_grace_us)
        self._meter = MeterStage(tables=self._meter_tables, violations=violations, **ports)
        self._rollup = RollupStage(table=self._shared_table, **ports)

    def _verifier(self) -> Verifier | None:
        if self._signer is None:
            return None
        own = {self._signer.kid: PublicKey(self._signer.public_bytes)}
        return Verifier(self._public_keys | own, lambda: self.now_us)

    async def _end_of(self, topic: str, partition: int) -> int:
        return len(self._topics.log((topic, partition)))

    def _tables(self) -> None:
        self._meter_tables = MeterTables(
            *(MemoryTable(name, self.changelog, self._power) for name in ("scopes", "ids"))
        )
        self._shared_table = MemoryTable("shared", self.changelog, self._power)

    def _restart(self) -> None:
        self._power.left = None
        meanwhile, self._meanwhile = self._meanwhile, None
        if meanwhile is not None:
            self._is_down = True
            meanwhile()
            self._is_down = False
        for reader in (self._intake_reader, self._meter_reader, self._rollup_reader, self._recorder_reader):
            reader.rewind()
        self._start()

    def _on_change(self) -> None:
        self._judge_again = True

    def _drive(self) -> None:
        if self._is_down:
            return
        self._until_powered(self._flush if self._autoflush else self._rest)

    def _until_powered(self, work: Callable[[], None]) -> None:
        try:
            work()
        except PowerCutError:
            self._restart()
            self._drive()

    def _flush(self) -> None:
        self._rest()
        self._intake_reader.commit()
        self._run(self._meter.flush())
        self._rest()
        self._run(self._rollup.flush())
        self._rest()
        self._recorder_reader.commit()

    def _rest(self) -> None:
        """Read everything there is to be read, and judge again what a changed budget or price asks for."""
        for _ in range(STEPS_MAX):
            if not self._step():
                return
        raise RuntimeError(f"the pipeline did not come to rest in {STEPS_MAX} reads")

    def _step(self) -> bool:
        if records := self._feed_reader.take(RECORDS_PER_READ):
            for record in records:
                take_in = self._feed.budget_record if record.topic == BUDGETS.name else self._feed.price_record
                take_in(record.key, record.value)
        elif records := self._command_reader.take(RECORDS_PER_READ):
            for record in records:
                self._register.follow(Record(*record[:6], tuple(record.headers)))
        elif self._judge_again:
            self._judge_again = False
            self._run(self._reconsider())
        elif records := self._intake_reader.take(RECORDS_PER_READ):
            self._run(self._take_in(records))
        elif records := self._meter_reader.take(1):
            self._run(self._meter.on_record(records[0]))
        elif records := self._rollup_reader.take(1):
            self._run(self._rollup.on_record(records[0]))
        elif records := self._recorder_reader.take(RECORDS_PER_READ):
            self._run(self._record(records))
        else:
            return False
        return True

    async def _take_in(self, records: list[SourceRecord]) -> None:
        for each in rounds(records, self.partitions, self._limits, self.now_us, self._register.correction):
            await asyncio.gather(*await self._publisher.round(each, EMITTER, self.now_us))

    async def _record(self, records: list[SourceRecord]) -> None:
        deliveries, _ = await recorder.record(records, self._publisher, self.partitions, self.now_us, self._register)
        await asyncio.gather(*deliveries)

    async def _reconsider(self) -> None:
        owned = set(range(self.partitions))
        await self._meter.flush()
        await self._rollup.flush()
        await self._meter.reconsider(owned)
        await self._rollup.reconsider(owned)

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return self._loop.run_until_complete(work)


_MICROSECOND: Final = timedelta(microseconds=1)


@cache
def _shipped_book() -> PriceBookFile:
    return price_book_file.shipped()


def _whole(said: bytes | None) -> int:
    return int(said) if said is not None and said.isdigit() else -1
