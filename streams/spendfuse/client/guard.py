"""The obeyer beside an agent: `check()` before every call, and it raises `Halted` when a cap has tripped.

    guard = Guard.from_env()          # SPENDFUSE_WORKSPACE, _TEAM, _AGENT, _PUBLIC_KEYS, _BOOTSTRAP_SERVERS
    guard.check()                     # raises Halted; costs well under a microsecond
    model = guard.model("gpt-5")      # another one while degraded
    with guard.call(Tokens(input=2_000, output=500), provider="openai", model="gpt-5") as call:
        call.settle(client.responses.create(model=call.model, ...))   # announced, checked, settled: see `calls`

It reads `commands.v1` from the beginning in the background thread, without a consumer group. It halts by itself when
it knows too little (`fail_mode`): see `GuardState` and `Guard.check`.
"""

import asyncio
import logging
import threading
import uuid
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from time import monotonic
from typing import Final, Literal, NamedTuple, Self

from spendfuse.client.accept import Reason, Refused, accept, accept_heartbeat, accept_remaining, scope_of
from spendfuse.client.acks import Acks
from spendfuse.client.admission import Admission, Bounds
from spendfuse.client.background import BACKGROUND
from spendfuse.client.calls import DEADLINE_S, Call, Extract
from spendfuse.client.clock import Clock, TrustedTime, parse_clock, wall_clock
from spendfuse.client.emitted import EMITTED
from spendfuse.client.environment import check_names, own
from spendfuse.client.follow import Follower, Record
from spendfuse.client.halted import Halted
from spendfuse.client.identity import Identity
from spendfuse.client.keys import guard_signer_of, verifier_of
from spendfuse.client.lease import NONE
from spendfuse.client.memory import Memory
from spendfuse.client.meter import Meter
from spendfuse.client.obey import Obedience, Verdict, expired
from spendfuse.client.signs import Signs
from spendfuse.client.silence import GuardState, Silence
from spendfuse.engine.prices import PriceBook
from spendfuse.settings import (
    BrokerSettings,
    ClockSettings,
    GuardSettings,
    IdentitySettings,
    MeterSettings,
)
from spendfuse.wire.base import from_us, to_us
from spendfuse.wire.remaining import Remaining
from spendfuse.wire.topics import COMMANDS, HEARTBEATS, REMAINING
from spendfuse.wire.usage import Tokens, Usage

ACK_FLUSH_TIMEOUT_S: Final = 2.0
STOP_TIMEOUT_S: Final = 5.0
SYNC_STEP_S: Final = 0.01
WAIT_STEP_S: Final = 0.25
"""How often `wait_halted` looks by itself: blindness comes without a message."""
_NEVER: Final = float("-inf")
_ALWAYS: Final = float("inf")

_log = logging.getLogger("spendfuse")


class Left(NamedTuple):
    """What is left of a cap: as last heard, by the guard's own count (in the cap's unit), and how long ago."""

    heard: Remaining
    left: int
    age_s: float


class Guard:
    """Follows the commands for one agent and its ancestors (team, workspace, root run).

    `meter` and `price_book` are for `call`: by default a meter of its own, and the book that ships. All methods may be
    called from any thread. Raises SettingsError without public keys, unless `unsigned_commands` is set (development
    only).
    """

    def __init__(
        self,
        identity: IdentitySettings,
        broker: BrokerSettings | None = None,
        settings: GuardSettings | None = None,
        clock: Clock = wall_clock,
        meter: Meter | None = None,
        price_book: PriceBook | None = None,
    ) -> None:
        self.identity = Identity.of(identity)
        self.id = f"guard-{uuid.uuid4().hex[:16]}"
        self._names = identity
        self._broker = broker or BrokerSettings.from_env({})
        self._settings = settings or GuardSettings.from_env({})
        self._clock = clock
        self._meter, self._own_meter = meter, meter is None
        self._verifier = verifier_of(self._settings)
        # A run that is made anew for each process is no part of the name: a restart must find the file.
        kept_for = [self.identity.agent_scope, identity.root_run or identity.run]
        self._memory = Memory(self._settings.guard_dir, self._broker.bootstrap_servers, kept_for)
        self._closed = False
        self._acks = Acks(self.identity, self.id, self._broker, guard_signer_of(self._settings))
        self._bounds = Bounds(price_book)
        self._start_anew()
        BACKGROUND.enter(self)
        EMITTED.listen(self.identity.agent_path, self)
        self._ensure_started()

    @classmethod
    def from_env(cls, *, meter: Meter | None = None, price_book: PriceBook | None = None, **overrides: object) -> Self:
        """Return a guard with the settings of the environment, or of the keyword arguments in their place.

        Raises SettingsError with every fault of a group of settings at once.
        """
        check_names(overrides, IdentitySettings, BrokerSettings, GuardSettings, ClockSettings)
        return cls(
            IdentitySettings.from_env(None, **own(overrides, IdentitySettings)),
            BrokerSettings.from_env(None, **own(overrides, BrokerSettings)),
            GuardSettings.from_env(None, **own(overrides, GuardSettings)),
            parse_clock(ClockSettings.from_env(None, **own(overrides, ClockSettings)).clock),
            meter,
            price_book,
        )

    def _start_anew(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._settled = threading.Event()
        self._obedience = Obedience(self.identity.scopes)
        self._refused: Counter[Reason | Literal["heartbeat"]] = Counter()
        self._commands: Follower | None = None
        self._heartbeats: Follower | None = None
        self._remaining: Follower | None = None
        self._admission = Admission(self.identity)
        self._silence = Silence(self.identity.agent_scope, self._broker.bootstrap_servers, self._settings)
        self._leased = threading.Event()
        self._lease_until: float | None = None
        self._records: dict[str, Record] = {}
        self._time = TrustedTime(self._clock)
        self._tokens = 0
        self._signs = Signs()
        self._started = False
        self._heartbeats_read = False
        self._sync_until: float | None = None
        self._degraded = False
        # The whole fast path: until this monotonic time, check() has nothing to look at.
        self._free_until = _NEVER
        for record in self._memory.read():
            self._obey(record)

    # -- the agent's threads ---------------------------------------------------------------------------------------

    def check(self) -> None:
        """Return if the agent may go on, else raise Halted; never waits for the broker once the first calls returned.

        The first calls wait until all commands are read, together at most `sync_timeout_s`.
        """
        if monotonic() < self._free_until:
            return
        self._ensure_started()
        self._settled.wait(self._sync_wait_s())
        self._look()

    async def acheck(self) -> None:
        """Do what `check` does, without blocking the event loop."""
        if monotonic() < self._free_until:
            return
        self._ensure_started()
        while not self._settled.is_set() and (wait_s := self._sync_wait_s()) > 0:  # noqa: ASYNC110 - set by another thread
            await asyncio.sleep(min(wait_s, SYNC_STEP_S))
        self._look()

    def check_call(self, usage: Usage | None = None) -> None:
        """Do what `check` does for a call that would start; where only calls in flight fill a cap, it is NoRoom.

        Such a halt ends with those calls. Without `usage`, before anything is known of what remains, it passes. For
        `Call`.
        """
        try:
            self.check()
        except Halted as halted:
            self._no_call(halted, usage)

    async def acheck_call(self) -> None:
        """Do what `check_call` does, without blocking the event loop."""
        try:
            await self.acheck()
        except Halted as halted:
            self._no_call(halted, None)

    def _no_call(self, halted: Halted, usage: Usage | None) -> None:
        """Raise what keeps a call from starting."""
        bound = self._bounds.of(usage) if usage is not None else None
        with self._lock:
            halts = self._obedience.strictest(self._time.now_us()).halts
            self._admission.refuse(halted, halts, bound, self._clock())

    def model(self, name: str) -> str:
        """Return the model to use now in place of `name`: itself, unless the agent is degraded."""
        return self._verdict().model(name) if self._degraded else name

    @property
    def max_output_tokens(self) -> int | None:
        """Return the most output tokens a call may ask for now; None without a limit."""
        return self._verdict().max_output_tokens if self._degraded else None

    def call(
        self,
        bound: Tokens,
        *,
        provider: str,
        model: str,
        id: str | None = None,  # noqa: A002 - the name on the wire
        deadline_s: float = DEADLINE_S,
        extract: Extract | None = None,
        tier: str = "standard",
        workflow: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Call:
        """Return one model call, to be used as a context manager or a decorator, sync or async.

        `bound` is the most it may use (`input` as counted before it is sent, `output` as max_output_tokens). Entering
        raises Halted, or NoRoom when the bound does not fit in what remains of a cap of any ancestor; else the call is
        announced, and counts against caps until it is settled, at most `deadline_s` after its last sign of progress.
        """
        asked = Call(
            *(self, bound),
            provider=provider,
            model=model,
            call_id=id,
            deadline_s=deadline_s,
            extract=extract,
            labels={"tier": tier, "workflow": workflow, "tags": tags},
        )
        asked.check_bound()
        return asked

    @property
    def meter(self) -> Meter:
        """Return the meter that calls are announced with, made now if none was given."""
        with self._lock:
            if self._meter is None:
                self._meter = Meter(self._names, self._broker, MeterSettings.from_env(), self._clock)
            return self._meter

    @property
    def calls_in_flight(self) -> int:
        """Return how many calls of this process's agent have started and not finished."""
        with self._lock:
            return self._admission.lease.in_flight

    def remaining(self) -> list[Left]:
        """Return what is left of each cap over this agent by the guard's own count, and how old what it heard is."""
        self._follow_remaining()
        now_us = self._clock()
        with self._lock:
            return [
                Left(left, max(0, rest), max(0, now_us - to_us(left.at)) / 1e6)
                for left, rest in self._admission.lease.rests(now_us)
            ]

    def admit(self, call_id: str, usage: Usage, deadline_us: int, *, patient: bool) -> bool:
        """Count a call from now on at its bound; raise NoRoom if it does not fit. For `Call`, after `check`.

        Returns False, and counts nothing, while it must wait until what was started before is heard of (`patient`);
        at the end of its patience a call is refused while a worker is alive, since others may have taken the rest.
        """
        bound = self._bounds.of(usage)
        with self._lock:
            live = self.state is GuardState.LIVE
            return self._admission.admit(call_id, bound, deadline_us, self._clock(), live=live, patient=patient)

    def confirmed(self, call_id: str, usage: Usage) -> bool | None:
        """Say whether a worker has counted a call that was announced, None where that does not matter. For `Call`.

        Raises NoRoom when others have taken what it needs.
        """
        bound = self._bounds.of(usage)
        with self._lock:
            if self.state is not GuardState.LIVE:
                return None
            return self._admission.confirmed(call_id, bound, self._clock())

    def took_turn(self, *, gave_way: bool) -> None:
        """Note how a call that needed much of what was left ended its wait. For `Call`."""
        with self._lock:
            self._admission.took_turn(gave_way=gave_way)

    def wait_for_news(self, timeout_s: float) -> None:
        """Wait until something new is heard, at most `timeout_s`."""
        with self._changed:
            self._changed.wait(timeout_s)

    def widen(self, call_id: str, usage: Usage, deadline_us: int) -> None:
        """Count a call at more than its bound, which it has used already. For `Call`."""
        bound = self._bounds.of(usage)
        with self._lock:
            self._admission.lease.extend(call_id, bound, deadline_us)

    def on_usage(self, usage: Usage) -> None:
        """Count a usage of this agent that a meter of this process emits."""
        counted = usage.kind != "progress" and self._remaining is not None
        used = self._bounds.of(usage) if counted else NONE
        with self._lock:
            if self.state is not GuardState.LIVE:
                self._free_until = _NEVER  # look at what is left, and at the grace
            if usage.kind == "finished":
                self._tokens += usage.tokens.total
                self._admission.finished(usage.id, used)
            elif usage.kind == "started":
                until_us = to_us(usage.deadline) if usage.deadline else self.deadline_us(DEADLINE_S)
                self._admission.started(usage.id, used, until_us)

    def deadline_us(self, deadline_s: float) -> int:
        """Return the event time so many seconds of the machine's from now, in microseconds since the epoch."""
        return self._clock() + int(deadline_s * 1e6) * int(getattr(self._clock, "factor", 1))

    def deadline(self, deadline_s: float) -> datetime:
        """Return `deadline_us` as an instant."""
        return from_us(self.deadline_us(deadline_s))

    @property
    def state(self) -> GuardState:
        """Return what the guard knows at present."""
        return self._silence.state

    @property
    def refused(self) -> dict[str, int]:
        """Return how many records were not obeyed, by reason."""
        with self._lock:
            return {str(reason): count for reason, count in self._refused.items()}

    def wait_halted(self, timeout_s: float | None = None) -> Halted | None:
        """Wait until `check` would raise, and return what it would raise; None after `timeout_s`.

        For supervisors: it acknowledges nothing as enforced. Call `enforced` once the agent has been stopped.
        """
        give_up_at = _ALWAYS if timeout_s is None else monotonic() + timeout_s
        self._ensure_started()
        while True:
            with self._changed:
                known = self._settled.is_set() or self._sync_wait_s() == 0
                halted = self._halted(self._arm()) if known else None
                left_s = give_up_at - monotonic()
                if halted is not None or left_s <= 0:
                    return halted
                self._changed.wait(min(left_s, WAIT_STEP_S))

    def enforced(self) -> None:
        """Acknowledge every halt that holds as enforced, once each; `check` does so before it raises."""
        now = self._clock()
        with self._lock:
            halts = self._obedience.strictest(self._time.now_us()).halts
            self._acks.enforced(halts, now, self._tokens, self._admission.lease.in_flight)

    def close(self) -> None:
        """Send the acknowledgements that are left, and stop following. A closed guard cannot be asked again."""
        self._closed = True
        self._free_until = _NEVER
        BACKGROUND.leave(self)
        EMITTED.forget(self.identity.agent_path, self)
        if self._own_meter and self._meter is not None:
            self._meter.close()
        self._acks.close(ACK_FLUSH_TIMEOUT_S)
        if self._started:
            try:
                BACKGROUND.spawn(self._stop_following()).result(STOP_TIMEOUT_S)
            except (TimeoutError, RuntimeError) as error:
                _log.warning("spendfuse guard did not stop following in time: %r", error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await asyncio.to_thread(self.close)

    def finish(self, *, last: bool) -> None:
        """Send the acknowledgements that are left: the process ends."""
        if not last:
            self._acks.flush(ACK_FLUSH_TIMEOUT_S)
        elif not self._acks.close(ACK_FLUSH_TIMEOUT_S):
            _log.warning("spendfuse guard ends with %d acknowledgements unsent", self._acks.dropped)

    def forked(self) -> None:
        """Start anew at the next use: this is a forked child, without the parent's thread."""
        BACKGROUND.abandon((self._commands, self._heartbeats, self._remaining))
        self.id = f"guard-{uuid.uuid4().hex[:16]}"
        self._acks.forked(self.id)
        self._start_anew()

    def _ensure_started(self) -> None:
        if self._closed:
            raise RuntimeError("this guard is closed: make another one")
        with self._lock:
            if self._started:
                return
            self._started = True
        BACKGROUND.spawn(self._follow())

    def _follow_remaining(self) -> None:
        """Follow what remains from now on: only who asks for it pays for it."""
        self._ensure_started()
        with self._lock:
            if self._remaining is not None:
                return
            self._remaining = Follower(
                *(self._broker, REMAINING.name, self._on_remaining),
                client_id="spendfuse-guard",
                on_caught_up=self._leased.set,
            )
            self._lease_until = monotonic() + self._settings.sync_timeout_s
            remaining = self._remaining

        async def start() -> None:
            remaining.start()

        BACKGROUND.spawn(start())

    def lease_wait_s(self) -> float:
        """Return how long a call still waits to have read what remains; 0 once it is read, or the time is over."""
        self._follow_remaining()
        if self._leased.is_set() or self._lease_until is None:
            return 0.0
        return max(0.0, self._lease_until - monotonic())

    def wait_for_remaining(self, timeout_s: float) -> None:
        """Wait until what remains has been read, at most `timeout_s`."""
        if timeout_s > 0:
            self._leased.wait(timeout_s)

    def _sync_wait_s(self) -> float:
        if self._sync_until is None:
            self._sync_until = monotonic() + self._settings.sync_timeout_s
        return max(0.0, self._sync_until - monotonic())

    def _look(self) -> None:
        with self._lock:
            halted = self._halted(self._arm())
        if halted is not None:
            self.enforced()
            raise halted

    def _verdict(self) -> Verdict:
        with self._lock:
            return self._arm()

    def _arm(self) -> Verdict:
        """Return what holds now, and set the fast path by it; the lock is held, or a halt could be painted over."""
        verdict = self._obedience.strictest(self._time.now_us())
        self._degraded = bool(verdict.degrades)
        if verdict.halts or not self._settled.is_set():
            self._free_until = _NEVER
        else:
            self._free_until = self._silence.nothing_to_do_until()
        return verdict

    def _halted(self, verdict: Verdict) -> Halted | None:
        if verdict.halt is not None:
            return Halted.of(verdict.halt, self.identity.agent_scope)
        halted, free_until = self._silence.judge(self._admission.lease, self._tokens, self._clock())
        if free_until is not None:
            self._free_until = free_until
        return halted

    # -- the background thread -------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        if self._closed:
            return
        self._commands = Follower(
            *(self._broker, COMMANDS.name, self._on_command),
            client_id="spendfuse-guard",
            on_caught_up=self._on_commands_read,
        )
        self._heartbeats = Follower(
            *(self._broker, HEARTBEATS.name, self._on_heartbeat),
            client_id="spendfuse-guard",
            on_caught_up=self._on_heartbeats_read,
        )
        self._commands.start()
        self._heartbeats.start()

    async def _stop_following(self) -> None:
        for follower in (self._commands, self._heartbeats, self._remaining):
            if follower is not None:
                await follower.stop()

    def _on_command(self, record: Record) -> None:
        # A signature costs a hundred times what the rest does, and most commands are for others.
        if record.key is not None and not self._obedience.concerns(scope_of(record)):
            return
        try:
            command = accept(record, self._verifier, unsigned=self._settings.unsigned_commands)
        except Refused as refusal:
            self._refuse(refusal.reason)
            if refusal.reason in ("signature", "unsigned", "key"):
                _log.warning("spendfuse guard refused the command at offset %d: %s", record.offset, refusal)
            return
        now = self._clock()
        with self._changed:
            worth = self._obedience.apply(command)
            if worth == "ruling":
                self._records[command.key] = record
            if expired(command, self._time.now_us()):
                # It still rules out what it replaced: else a reader of the compacted topic would know otherwise.
                self._refused["expired"] += 1
            elif worth == "old" or worth == "full":  # noqa: PLR1714 - mypy narrows this form only
                self._refused[worth] += 1
            elif command.action == "halt" and self._silence.commands_read:
                self._acks.received(command, now, self._tokens, live=True)
            kept = self._in_force(self._arm())
            self._changed.notify_all()
        if self._silence.commands_read:
            self._memory.keep(kept)

    def _on_commands_read(self) -> None:
        now = self._clock()
        with self._changed:
            self._silence.commands_read = True
            # Of the past, only what still holds is acknowledged.
            verdict = self._obedience.strictest(self._time.now_us())
            for command in verdict.halts:
                self._acks.received(command, now, self._tokens, live=False)
            kept = self._in_force(verdict)
            self._settle()
        self._memory.keep(kept)

    def _obey(self, record: Record) -> None:
        """Take in a record that was kept over a restart."""
        try:
            command = accept(record, self._verifier, unsigned=self._settings.unsigned_commands)
        except Refused as refusal:
            self._refuse(refusal.reason)
            return
        with self._lock:
            if self._obedience.apply(command) == "ruling":
                self._records[command.key] = record

    def _in_force(self, verdict: Verdict) -> list[Record]:
        """Return the records of what holds, and forget the others; the lock is held."""
        keys = [command.key for command in (*verdict.halts, *verdict.degrades)]
        self._records = {key: self._records[key] for key in keys if key in self._records}
        return list(self._records.values())

    def _on_remaining(self, record: Record) -> None:
        if record.key is not None and not self._admission.lease.concerns(scope_of(record)):
            return
        try:
            left = accept_remaining(record, self._verifier, unsigned=self._settings.unsigned_commands)
        except Refused as refusal:
            self._refuse(refusal.reason)
            return
        with self._changed:
            self._admission.lease.hear(left)
            self._changed.notify_all()

    def _on_heartbeats_read(self) -> None:
        with self._changed:
            self._heartbeats_read = True
            self._settle()

    def _settle(self) -> None:
        if self._silence.commands_read and (self._heartbeats_read or self._settings.fail_mode != "closed"):
            self._settled.set()
        self._arm()
        self._changed.notify_all()

    def _on_heartbeat(self, record: Record) -> None:
        try:
            heartbeat = accept_heartbeat(record, self._verifier, unsigned=self._settings.unsigned_commands)
        except Refused as refusal:
            if refusal.reason != "tombstone":
                self._refuse("heartbeat")
            return
        self._memory.keep_again()
        if not self._signs.is_news(heartbeat):
            return
        if not heartbeat.ready or heartbeat.stale:
            return
        # What was in the topic before us may be from yesterday. What comes while we follow comes now: its age by two
        # machines' clocks would only add their difference.
        age_s = 0.0 if self._heartbeats_read else max(0.0, wall_clock() / 1e6 - record.timestamp_ms / 1e3)
        with self._lock:
            self._silence.heard(age_s)
            if self._heartbeats_read:
                self._time.hear(to_us(heartbeat.ts))
            if self._settings.fail_mode != "open":
                self._arm()

    def _refuse(self, reason: Reason | Literal["heartbeat"]) -> None:
        with self._lock:
            self._refused[reason] += 1
