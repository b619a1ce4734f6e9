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
import random
import threading
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from time import monotonic
from typing import Final, Literal, NamedTuple, Self

from spendfuse.client.accept import Reason, Refused, accept, accept_heartbeat, accept_remaining, scope_of
from spendfuse.client.background import BACKGROUND
from spendfuse.client.calls import DEADLINE_S, Call, Extract
from spendfuse.client.clock import Clock, TrustedTime, parse_clock, wall_clock
from spendfuse.client.emitted import EMITTED
from spendfuse.client.environment import check_names, own
from spendfuse.client.follow import Follower, Record
from spendfuse.client.halted import Halted, NoRoom
from spendfuse.client.identity import Identity
from spendfuse.client.keys import Verifier
from spendfuse.client.lease import NONE, Amount, Lease, Room
from spendfuse.client.memory import Memory
from spendfuse.client.meter import Meter
from spendfuse.client.obey import Obedience, Verdict, expired
from spendfuse.client.outbox import Message, Outbox
from spendfuse.client.prices import shipped_book
from spendfuse.client.signs import Signs
from spendfuse.client.turns import Turns
from spendfuse.engine.prices import PriceBook
from spendfuse.engine.sentences import amount
from spendfuse.settings import (
    BrokerSettings,
    ClockSettings,
    GuardSettings,
    IdentitySettings,
    MeterSettings,
    SettingsError,
)
from spendfuse.wire.base import encode, from_us, rfc3339, to_us
from spendfuse.wire.cloudevents import headers
from spendfuse.wire.control import Ack, Command
from spendfuse.wire.remaining import Remaining
from spendfuse.wire.topics import ACKS, COMMANDS, HEARTBEATS, REMAINING
from spendfuse.wire.usage import Tokens, Usage

ACKS_MAX: Final = 1_000
ACK_FLUSH_TIMEOUT_S: Final = 2.0
STOP_TIMEOUT_S: Final = 5.0
SYNC_STEP_S: Final = 0.01
WAIT_STEP_S: Final = 0.25
"""How often `wait_halted` looks by itself: blindness comes without a message."""
COLD_S: Final = 1.0
"""How long after the first call others wait to hear of a cap: until then nobody knows that there is one."""
LOOK_AGAIN_S: Final = 0.05
"""How often a guard that hears nothing looks at its grace again, while nothing is emitted."""
_NEVER: Final = float("-inf")
_ALWAYS: Final = float("inf")

_log = logging.getLogger("spendfuse")


class GuardState(StrEnum):
    """What a guard knows: nothing yet; all, now; all, a while ago; nothing of late.

    With `fail_mode` bounded (the default) an agent goes on while STALE until its own calls have used up what was last
    known to remain, and while BLIND, or not yet SYNCED, for `grace_s` and `grace_tokens`; then it is halted until a
    sign of life comes. `closed` halts at once when BLIND; `open` never does.
    """

    SYNCING = "syncing"
    LIVE = "live"
    STALE = "stale"
    BLIND = "blind"


class Left(NamedTuple):
    """What is left of a cap: as last heard, by the guard's own count (in the cap's unit), and how long ago."""

    heard: Remaining
    left: int
    age_s: float


@dataclass(slots=True)
class _Obeyed:
    """The halt of one cap that was acknowledged last."""

    seq: int
    live: bool
    tokens_before: int = 0
    enforced: bool = False


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
        self._book = price_book
        self._verifier = _verifier(self._settings)
        # A run that is made anew for each process is no part of the name: a restart must find the file.
        kept_for = [self.identity.agent_scope, identity.root_run or identity.run]
        self._memory = Memory(self._settings.guard_dir, self._broker.bootstrap_servers, kept_for)
        self._closed = False
        self._acks: Outbox[Ack] = Outbox(
            *(self._broker, ACKS.name, self._pack_acks),
            client_id="spendfuse-guard",
            buffer_max=ACKS_MAX,
            linger_s=0.0,
        )
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
        self._obeyed: dict[str, _Obeyed] = {}
        self._refused: Counter[Reason | Literal["heartbeat"]] = Counter()
        self._commands: Follower | None = None
        self._heartbeats: Follower | None = None
        self._remaining: Follower | None = None
        self._lease = Lease(self.identity.scopes)
        self._turns = Turns()
        self._leased = threading.Event()
        self._lease_until: float | None = None
        self._first_call_at: float | None = None
        self._records: dict[str, Record] = {}
        self._time = TrustedTime(self._clock)
        self._tokens = 0
        self._grace_from: tuple[float, int] | None = None
        self._signs = Signs()
        self._started = False
        self._commands_read = self._heartbeats_read = False
        self._last_sign = _NEVER
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
        with self._lock:
            halts = self._obedience.strictest(self._time.now_us()).halts
            filled = self._lease.filled_by_calls(halts, self._clock())
        if halted.command is None or not all(_is_of_holds(halt) for halt in halts):
            raise halted
        if usage is None:
            return
        if filled is None:
            raise halted
        left, rest = filled
        bound = self._amount(usage)
        raise self._no_room(Room(left, rest, bound.tokens if left.unit == "tokens" else bound.nanos)) from halted

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
            return self._lease.in_flight

    def remaining(self) -> list[Left]:
        """Return what is left of each cap over this agent by the guard's own count, and how old what it heard is."""
        self._follow_remaining()
        now_us = self._clock()
        with self._lock:
            return [
                Left(left, max(0, rest), max(0, now_us - to_us(left.at)) / 1e6)
                for left, rest in self._lease.rests(now_us)
            ]

    def admit(self, call_id: str, usage: Usage, deadline_us: int, *, patient: bool) -> bool:
        """Count a call from now on at its bound; raise NoRoom if it does not fit. For `Call`, after `check`.

        Returns False, and counts nothing, while it must wait until what was started before is heard of (`patient`);
        at the end of its patience a call is refused while a worker is alive, since others may have taken the rest.
        """
        bound = self._amount(usage)
        with self._lock:
            now_us = self._clock()
            room = self._lease.no_room(bound, now_us)
            if room is None:
                live = self.state is GuardState.LIVE
                waits = live and (self._lease.is_crowded(bound, now_us) or self._must_wait(bound, now_us))
                if patient and (waits or (live and self._is_cold())):
                    return False
                if not waits or self._is_cold():
                    if self._first_call_at is None:
                        self._first_call_at = monotonic()
                    self._lease.start(call_id, bound, _wall_ms(), deadline_us)
                    return True
                left, rest = min(self._lease.rests(now_us), key=lambda pair: pair[1])
                room = Room(left, rest, bound.tokens if left.unit == "tokens" else bound.nanos)
        raise self._no_room(room)

    def _must_wait(self, bound: Amount, now_us: int) -> bool:
        """Say whether a call that needs much of what is left comes too soon after one that gave way to others'."""
        return self._turns.must_wait(monotonic()) and self._lease.will_need_confirmation(bound, now_us)

    def _is_cold(self) -> bool:
        """Say whether a first call has just been announced, and nothing been heard of any cap yet."""
        if self._first_call_at is None or self._lease.heard:
            return False
        return monotonic() - self._first_call_at < COLD_S

    def confirmed(self, call_id: str, usage: Usage) -> bool | None:
        """Say whether a worker has counted a call that was announced, None where that does not matter. For `Call`.

        Raises NoRoom when others have taken what it needs.
        """
        bound = self._amount(usage)
        with self._lock:
            now_us = self._clock()
            if self.state is not GuardState.LIVE or not self._lease.needs_confirmation(call_id, bound, now_us):
                return None
            known, room = self._lease.confirmed(call_id, now_us)
            if room is None:
                return known
        raise self._no_room(room)

    def took_turn(self, *, gave_way: bool) -> None:
        """Note how a call that needed much of what was left ended its wait. For `Call`."""
        with self._lock:
            if gave_way:
                self._turns.lost(monotonic(), random.random())  # noqa: S311 - to differ from other processes, no secret
            else:
                self._turns.won()

    def wait_for_news(self, timeout_s: float) -> None:
        """Wait until something new is heard, at most `timeout_s`."""
        with self._changed:
            self._changed.wait(timeout_s)

    def _no_room(self, room: Room) -> NoRoom:
        left = room.remaining
        age_s = max(0, self._clock() - to_us(left.at)) / 1e6
        return NoRoom(
            f"{self.identity.agent_scope} may not start this call: it may use up to {amount(room.needed, left.unit)}, "
            f"and {left.scope} has {amount(max(0, room.left), left.unit)} left of its cap of "
            f"{amount(left.amount, left.unit)} ({left.budget}, cap {left.cap}; known {age_s:.1f} s ago). "
            "Ask for a smaller answer, or try again when calls in flight have ended",
            *(left, room.needed, room.left),
        )

    def widen(self, call_id: str, usage: Usage, deadline_us: int) -> None:
        """Count a call at more than its bound, which it has used already. For `Call`."""
        bound = self._amount(usage)
        with self._lock:
            self._lease.extend(call_id, bound, deadline_us)

    def on_usage(self, usage: Usage) -> None:
        """Count a usage of this agent that a meter of this process emits."""
        counted = usage.kind != "progress" and self._remaining is not None
        used = self._amount(usage) if counted else NONE
        with self._lock:
            if self.state is not GuardState.LIVE:
                self._free_until = _NEVER  # look at what is left, and at the grace
            if usage.kind == "finished":
                self._tokens += usage.tokens.total
                self._lease.finish(usage.id, used, _wall_ms())
            elif usage.kind == "started":
                until_us = to_us(usage.deadline) if usage.deadline else self.deadline_us(DEADLINE_S)
                self._lease.start(usage.id, used, _wall_ms(), until_us)

    def deadline_us(self, deadline_s: float) -> int:
        """Return the event time so many seconds of the machine's from now, in microseconds since the epoch."""
        return self._clock() + int(deadline_s * 1e6) * int(getattr(self._clock, "factor", 1))

    def deadline(self, deadline_s: float) -> datetime:
        """Return `deadline_us` as an instant."""
        return from_us(self.deadline_us(deadline_s))

    @property
    def state(self) -> GuardState:
        """Return what the guard knows at present."""
        if not self._commands_read:
            return GuardState.SYNCING
        silence_s = monotonic() - self._last_sign
        if silence_s > self._settings.blind_after_s:
            return GuardState.BLIND
        return GuardState.STALE if silence_s > self._settings.stale_after_s else GuardState.LIVE

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
            acks = [
                self._ack(command, "enforced", now)
                for command in self._obedience.strictest(self._time.now_us()).halts
                if self._enforced_first(command)
            ]
        for ack in acks:
            self._acks.put(ack)

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
            _log.warning("spendfuse guard ends with %d acknowledgements unsent", self._acks.counts().dropped)

    def forked(self) -> None:
        """Start anew at the next use: this is a forked child, without the parent's thread."""
        BACKGROUND.abandon((self._commands, self._heartbeats, self._remaining))
        self.id = f"guard-{uuid.uuid4().hex[:16]}"
        self._acks.forked()
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

    def _amount(self, usage: Usage) -> Amount:
        if self._book is None:
            self._book = shipped_book()
        return Amount(self._book.charge(usage).cost_nanos, usage.tokens.total)

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
        elif self._settings.fail_mode == "closed":
            self._free_until = self._last_sign + self._settings.blind_after_s
        elif self._settings.fail_mode == "bounded":
            self._free_until = self._last_sign + self._settings.stale_after_s
        else:
            self._free_until = _ALWAYS
        return verdict

    def _halted(self, verdict: Verdict) -> Halted | None:
        if verdict.halt is not None:
            return Halted(_sentence(self.identity.agent_scope, verdict.halt), verdict.halt)
        if self._settings.fail_mode == "open":
            return None
        state = self.state
        if self._settings.fail_mode == "bounded":
            return self._out_of_bounds(state)
        if state is GuardState.SYNCING:
            return Halted(f"{self.identity.agent_scope} may not start: {self._unread()}, and fail_mode is closed")
        if state is GuardState.BLIND:
            return Halted(f"{self.identity.agent_scope} must stop: {self._silence()}, and fail_mode is closed")
        return None

    def _out_of_bounds(self, state: GuardState) -> Halted | None:
        """Return why an agent whose guard hears nothing may not go on any more; the lock is held."""
        if state is GuardState.LIVE:
            self._grace_from = None  # what was used meanwhile is counted by the worker now
            return None
        agent = self.identity.agent_scope
        room = self._lease.no_room(NONE, self._clock())
        if room is not None:
            left = room.remaining
            return Halted(
                f"{agent} must stop: {self._silence()}, and its own calls have since used up what was left of "
                f"{left.scope}'s cap of {amount(left.amount, left.unit)} ({left.budget}, cap {left.cap})"
            )
        now = monotonic()
        # Only a usage, or time, can change the answer.
        if state is GuardState.STALE:
            self._free_until = now + LOOK_AGAIN_S
            return None
        if self._grace_from is None:
            self._grace_from = (now, self._tokens)
        since, tokens_before = self._grace_from
        used = self._tokens - tokens_before
        settings = self._settings
        if now - since < settings.grace_s and used <= settings.grace_tokens:
            self._free_until = min(now + LOOK_AGAIN_S, since + settings.grace_s)
            return None
        why = self._unread() if state is GuardState.SYNCING else self._silence()
        return Halted(
            f"{agent} must stop: {why}, and the grace of {settings.grace_s:g} s and {settings.grace_tokens:,} tokens "
            f"is used up ({now - since:.0f} s, {used:,} tokens). It goes on at the first sign of life"
        )

    def _unread(self) -> str:
        return (
            f"the commands at {self._broker.bootstrap_servers} could not be read within "
            f"{self._settings.sync_timeout_s:g} s"
        )

    def _silence(self) -> str:
        silence_s = monotonic() - self._last_sign
        known = f"{silence_s:.1f} s" if silence_s < _ALWAYS else f"{self._settings.blind_after_s:g} s"
        return f"no sign of life from a spendfuse worker at {self._broker.bootstrap_servers} for {known}"

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
        ack = None
        with self._changed:
            worth = self._obedience.apply(command)
            if worth == "ruling":
                self._records[command.key] = record
            if expired(command, self._time.now_us()):
                # It still rules out what it replaced: else a reader of the compacted topic would know otherwise.
                self._refused["expired"] += 1
            elif worth == "old" or worth == "full":  # noqa: PLR1714 - mypy narrows this form only
                self._refused[worth] += 1
            elif command.action == "halt" and self._commands_read:
                ack = self._received(command, now, live=True)
            kept = self._in_force(self._arm())
            self._changed.notify_all()
        if ack is not None:
            self._acks.put(ack)
        if self._commands_read:
            self._memory.keep(kept)

    def _on_commands_read(self) -> None:
        now = self._clock()
        with self._changed:
            self._commands_read = True
            # Of the past, only what still holds is acknowledged.
            verdict = self._obedience.strictest(self._time.now_us())
            acks = [self._received(command, now, live=False) for command in verdict.halts]
            kept = self._in_force(verdict)
            self._settle()
        for ack in acks:
            self._acks.put(ack)
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
        if record.key is not None and not self._lease.concerns(scope_of(record)):
            return
        try:
            left = accept_remaining(record, self._verifier, unsigned=self._settings.unsigned_commands)
        except Refused as refusal:
            self._refuse(refusal.reason)
            return
        with self._changed:
            self._lease.hear(left)
            self._changed.notify_all()

    def _on_heartbeats_read(self) -> None:
        with self._changed:
            self._heartbeats_read = True
            self._settle()

    def _settle(self) -> None:
        if self._commands_read and (self._heartbeats_read or self._settings.fail_mode != "closed"):
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
        if not self._signs.is_news(heartbeat):
            return
        if not heartbeat.ready or heartbeat.stale:
            return
        # What was in the topic before us may be from yesterday. What comes while we follow comes now: its age by two
        # machines' clocks would only add their difference.
        age_s = 0.0 if self._heartbeats_read else max(0.0, wall_clock() / 1e6 - record.timestamp_ms / 1e3)
        with self._lock:
            self._last_sign = max(self._last_sign, monotonic() - age_s)
            if self._heartbeats_read:
                self._time.hear(to_us(heartbeat.ts))
            if self.state is GuardState.LIVE:
                self._grace_from = None
            if self._settings.fail_mode != "open":
                self._arm()

    def _refuse(self, reason: Reason | Literal["heartbeat"]) -> None:
        with self._lock:
            self._refused[reason] += 1

    def _received(self, command: Command, now_us: int, *, live: bool) -> Ack:
        self._obeyed[command.key] = _Obeyed(command.seq, live, self._tokens)
        return self._ack(command, "received", now_us)

    def _enforced_first(self, command: Command) -> bool:
        obeyed = self._obeyed.get(command.key)
        if obeyed is None or obeyed.seq != command.seq or obeyed.enforced:
            return False
        obeyed.enforced = True
        return True

    def _ack(self, command: Command, state: Literal["received", "enforced"], now_us: int) -> Ack:
        # A halt that was there before the guard says nothing about how fast halts arrive.
        obeyed = self._obeyed[command.key]
        lag_us = now_us - to_us(command.cause.ts) if command.cause is not None and obeyed.live else None
        return Ack(
            command_id=command.id,
            seq=command.seq,
            scope=command.scope,
            budget=command.budget,
            cap=command.cap,
            agent=self.identity.agent_scope,
            run=self.identity.run,
            guard=self.id,
            state=state,
            at=from_us(now_us),
            halt_lag_us=lag_us,
            calls_in_flight=self._lease.in_flight if state == "enforced" else None,
            tokens_since=self._tokens - obeyed.tokens_before if state == "enforced" else None,
        )

    def _pack_acks(self, acks: list[Ack]) -> list[Message[Ack]]:
        source = f"/guards/{self.id}"
        return [
            Message(
                ack.scope.encode(),
                encode(ack),
                headers("ack.v1", source, f"{ack.command_id}:{ack.guard}:{ack.state}", ack.at),
                (ack,),
            )
            for ack in acks
        ]


def _is_of_holds(halt: Command) -> bool:
    """Say whether a halt was for calls in flight alone: it is lifted when they end below their bounds."""
    return halt.measure is not None and halt.measure.spend < halt.measure.cap


def _wall_ms() -> int:
    return wall_clock() // 1_000  # what Kafka stamps are compared with, whatever clock the agent lives by


def _verifier(settings: GuardSettings) -> Verifier | None:
    if settings.public_keys:
        try:
            return Verifier.parse(settings.public_keys)
        except ValueError as error:
            raise SettingsError(f"settings cannot be used:\n  SPENDFUSE_PUBLIC_KEYS: {error}") from error
    if not settings.unsigned_commands:
        raise SettingsError(
            "a guard needs the public key of whoever may halt it: set SPENDFUSE_PUBLIC_KEYS=kid=base64 (or "
            "SPENDFUSE_PUBLIC_KEYS_FILE); for development alone, SPENDFUSE_UNSIGNED_COMMANDS=true obeys anybody"
        )
    _log.warning("spendfuse guard obeys unsigned commands: anybody who can write to %s commands it", COMMANDS.name)
    return None


def _sentence(agent: str, command: Command) -> str:
    what = command.message or f"{command.scope} is halted by budget {command.budget}, cap {command.cap}"
    reason = f" ({command.reason})" if command.reason and command.reason not in what else ""
    until = f", until {rfc3339(command.expires_at)}" if command.expires_at is not None else ""
    return f"{agent} is halted: {what}{reason} [by {command.by}, seq {command.seq}{until}]"
