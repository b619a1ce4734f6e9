"""The obeyer beside an agent: `check()` before every call, and it raises `Halted` when a cap has tripped.

    guard = Guard.from_env()          # SPENDFUSE_WORKSPACE, _TEAM, _AGENT, _PUBLIC_KEYS, _BOOTSTRAP_SERVERS
    guard.check()                     # raises Halted; costs well under a microsecond
    model = guard.model("gpt-5")      # another one while degraded

It reads `commands.v1` from the beginning in the background thread, without a consumer group.
"""

import asyncio
import logging
import threading
import uuid
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from time import monotonic
from typing import Final, Literal, Self

from pydantic import ValidationError

from spendfuse.client.accept import Reason, Refused, accept, scope_of
from spendfuse.client.background import BACKGROUND
from spendfuse.client.clock import Clock, parse_clock, wall_clock
from spendfuse.client.environment import check_names, own
from spendfuse.client.follow import Follower, Record
from spendfuse.client.identity import Identity
from spendfuse.client.keys import Verifier
from spendfuse.client.obey import Obedience, Verdict, expired
from spendfuse.client.outbox import Message, Outbox
from spendfuse.settings import BrokerSettings, ClockSettings, GuardSettings, IdentitySettings, SettingsError
from spendfuse.wire.base import encode, from_us, rfc3339, to_us
from spendfuse.wire.cloudevents import headers
from spendfuse.wire.control import Ack, Command, Heartbeat
from spendfuse.wire.topics import ACKS, COMMANDS, HEARTBEATS

ACKS_MAX: Final = 1_000
ACK_FLUSH_TIMEOUT_S: Final = 2.0
STOP_TIMEOUT_S: Final = 5.0
SYNC_STEP_S: Final = 0.01
WAIT_STEP_S: Final = 0.25
"""How often `wait_halted` looks by itself: blindness comes without a message."""
_NEVER: Final = float("-inf")
_ALWAYS: Final = float("inf")

_log = logging.getLogger("spendfuse")


class GuardState(StrEnum):
    """What a guard knows: nothing yet; all, now; all, a while ago; nothing of late."""

    SYNCING = "syncing"
    LIVE = "live"
    STALE = "stale"
    BLIND = "blind"


class Halted(Exception):  # noqa: N818 - named by the design
    """The agent must stop: a cap tripped, a person said so, or (fail_mode closed) the guard is blind.

    `command` is the halt that is obeyed, None when there is none to be seen.
    """

    def __init__(self, message: str, command: Command | None = None) -> None:
        super().__init__(message)
        self.command = command


@dataclass(slots=True)
class _Obeyed:
    """The halt of one cap that was acknowledged last."""

    seq: int
    live: bool
    enforced: bool = False


class Guard:
    """Follows the commands for one agent and its ancestors (team, workspace, root run).

    All methods may be called from any thread. Raises SettingsError without public keys, unless
    `unsigned_commands` is set (development only).
    """

    def __init__(
        self,
        identity: IdentitySettings,
        broker: BrokerSettings | None = None,
        settings: GuardSettings | None = None,
        clock: Clock = wall_clock,
    ) -> None:
        self.identity = Identity.of(identity)
        self.id = f"guard-{uuid.uuid4().hex[:16]}"
        self._broker = broker or BrokerSettings.from_env({})
        self._settings = settings or GuardSettings.from_env({})
        self._clock = clock
        self._verifier = _verifier(self._settings)
        self._closed = False
        self._acks: Outbox[Ack] = Outbox(
            *(self._broker, ACKS.name, self._pack_acks),
            client_id="spendfuse-guard",
            buffer_max=ACKS_MAX,
            linger_s=0.0,
        )
        self._start_anew()
        BACKGROUND.enter(self)
        self._ensure_started()

    @classmethod
    def from_env(cls, **overrides: object) -> Self:
        """Return a guard with the settings of the environment, or of the keyword arguments in their place.

        Raises SettingsError with every fault of a group of settings at once.
        """
        check_names(overrides, IdentitySettings, BrokerSettings, GuardSettings, ClockSettings)
        return cls(
            IdentitySettings.from_env(None, **own(overrides, IdentitySettings)),
            BrokerSettings.from_env(None, **own(overrides, BrokerSettings)),
            GuardSettings.from_env(None, **own(overrides, GuardSettings)),
            parse_clock(ClockSettings.from_env(None, **own(overrides, ClockSettings)).clock),
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
        self._started = False
        self._commands_read = self._heartbeats_read = False
        self._last_sign = _NEVER
        self._sync_until: float | None = None
        self._degraded = False
        # The whole fast path: until this monotonic time, check() has nothing to look at.
        self._free_until = _NEVER

    # -- the agent's threads ---------------------------------------------------------------------------------------

    def check(self) -> None:
        """Return if the agent may go on, else raise Halted.

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

    def model(self, name: str) -> str:
        """Return the model to use now in place of `name`: itself, unless the agent is degraded."""
        return self._verdict().model(name) if self._degraded else name

    @property
    def max_output_tokens(self) -> int | None:
        """Return the most output tokens a call may ask for now; None without a limit."""
        return self._verdict().max_output_tokens if self._degraded else None

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
                for command in self._obedience.strictest(now).halts
                if self._enforced_first(command)
            ]
        for ack in acks:
            self._acks.put(ack)

    def close(self) -> None:
        """Send the acknowledgements that are left, and stop following. A closed guard cannot be asked again."""
        self._closed = True
        self._free_until = _NEVER
        BACKGROUND.leave(self)
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
        BACKGROUND.abandon((self._commands, self._heartbeats))
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
        verdict = self._obedience.strictest(self._clock())
        self._degraded = bool(verdict.degrades)
        if verdict.halts or not self._settled.is_set():
            self._free_until = _NEVER
        elif self._settings.fail_mode == "closed":
            self._free_until = self._last_sign + self._settings.blind_after_s
        else:
            self._free_until = _ALWAYS
        return verdict

    def _halted(self, verdict: Verdict) -> Halted | None:
        if verdict.halt is not None:
            return Halted(_sentence(self.identity.agent_scope, verdict.halt), verdict.halt)
        if self._settings.fail_mode == "open":
            return None
        state = self.state
        if state is GuardState.SYNCING:
            return Halted(
                f"{self.identity.agent_scope} may not start: the commands at {self._broker.bootstrap_servers} could "
                f"not be read within {self._settings.sync_timeout_s:g} s, and fail_mode is closed"
            )
        if state is GuardState.BLIND:
            return Halted(
                f"{self.identity.agent_scope} must stop: no sign of life from a spendfuse worker at "
                f"{self._broker.bootstrap_servers} for {self._settings.blind_after_s:g} s, and fail_mode is closed"
            )
        return None

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
        for follower in (self._commands, self._heartbeats):
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
            if expired(command, now):
                # It still rules out what it replaced: else a reader of the compacted topic would know otherwise.
                self._refused["expired"] += 1
            elif worth == "old" or worth == "full":  # noqa: PLR1714 - mypy narrows this form only
                self._refused[worth] += 1
            elif command.action == "halt" and self._commands_read:
                ack = self._received(command, now, live=True)
            self._arm()
            self._changed.notify_all()
        if ack is not None:
            self._acks.put(ack)

    def _on_commands_read(self) -> None:
        now = self._clock()
        with self._changed:
            self._commands_read = True
            # Of the past, only what still holds is acknowledged.
            acks = [self._received(command, now, live=False) for command in self._obedience.strictest(now).halts]
            self._settle()
        for ack in acks:
            self._acks.put(ack)

    def _on_heartbeats_read(self) -> None:
        with self._changed:
            self._heartbeats_read = True
            self._settle()

    def _settle(self) -> None:
        if self._commands_read and (self._heartbeats_read or self._settings.fail_mode == "open"):
            self._settled.set()
        self._arm()
        self._changed.notify_all()

    def _on_heartbeat(self, record: Record) -> None:
        try:
            heartbeat = Heartbeat.model_validate_json(record.value or b"")
        except ValidationError:
            if record.value is not None:
                self._refuse("heartbeat")
            return
        if not heartbeat.ready or heartbeat.stale:
            return
        # What was in the topic before us may be from yesterday. What comes while we follow comes now: its age by two
        # machines' clocks would only add their difference.
        age_s = 0.0 if self._heartbeats_read else max(0.0, wall_clock() / 1e6 - record.timestamp_ms / 1e3)
        with self._lock:
            self._last_sign = max(self._last_sign, monotonic() - age_s)
            if self._settings.fail_mode == "closed":
                self._arm()

    def _refuse(self, reason: Reason | Literal["heartbeat"]) -> None:
        with self._lock:
            self._refused[reason] += 1

    def _received(self, command: Command, now_us: int, *, live: bool) -> Ack:
        self._obeyed[command.key] = _Obeyed(command.seq, live)
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
