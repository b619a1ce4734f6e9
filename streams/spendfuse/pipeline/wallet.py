"""The live wallet: what every scope has spent of what it may spend, as the worker's own topics say. Pure.

It is given records (the changelogs of the worker's tables, budgets, commands, heartbeats) in any order and any
number of times, and answers with rows. Reading them takes no consumer group, so looking disturbs nobody.
"""

import re
from dataclasses import dataclass
from typing import Final, NamedTuple

from pydantic import ValidationError

from spendfuse.client.accept import Refused, accept
from spendfuse.client.follow import Record
from spendfuse.client.keys import Verifier
from spendfuse.engine.crossings import Held
from spendfuse.engine.forecast import burn_per_hour
from spendfuse.engine.policies import Policies
from spendfuse.engine.rollup import held_by
from spendfuse.engine.spend import NANOS, Spend, merged
from spendfuse.engine.state import Fuse, ScopeState, SharedState
from spendfuse.engine.wallet import FuseLook, WalletRow, wallet_rows
from spendfuse.engine.windows import RUN_KEY, calendar_window
from spendfuse.pipeline.codec import UnreadableStateError, decode_scope, decode_shared
from spendfuse.pipeline.feed import BUDGETS_MAX, WORKSPACE_KEY, decode_budget
from spendfuse.pipeline.routing import split_state_key
from spendfuse.wire.base import SCOPE_PATTERN, to_us
from spendfuse.wire.budget import Budget, WorkspaceSettings
from spendfuse.wire.control import MANUAL_BUDGET, MANUAL_CAP, Command, Heartbeat
from spendfuse.wire.scopes import ancestors, scope_kind, scope_workspace
from spendfuse.wire.topics import BUDGETS, COMMANDS, HEARTBEATS

SCOPES_MAX: Final = 200_000
"""Most scopes remembered; those that come later are counted in `unseen`, and not shown."""
COMMANDS_MAX: Final = 100_000
WORKERS_MAX: Final = 1_000
WORKER_GONE_MS: Final = 60_000
"""A worker silent for so long is not listed any more."""
UNBUDGETED_UNIT: Final = "nano-USD"
"""The unit of a scope without a cap: price books are in USD."""


_SCOPE: Final = re.compile(SCOPE_PATTERN)


class WorkerSign(NamedTuple):
    """A worker's last sign of life, and how long ago it was by the wall clock, in ms."""

    beat: Heartbeat
    age_ms: int


class WalletHeader(NamedTuple):
    """What stands above the rows. `unseen` and `unreadable` count what the rows do not show."""

    now_us: int
    workers: tuple[WorkerSign, ...]
    budgets: int
    scopes: int
    price_book: str
    lag: int
    halts: tuple[Command, ...]
    unseen: int = 0
    unreadable: int = 0


class _Money(NamedTuple):
    """A scope's sums, holds and fuses, whichever table they are from."""

    spend: Spend
    held: Held
    fuses: dict[str, Fuse]


@dataclass(slots=True)
class _Stored:
    """A state as it was written; decoded when it is first asked for, since most are replaced before they are shown."""

    value: bytes
    agent: ScopeState | None = None
    shared: SharedState | None = None


def changelog(app_id: str, table: str) -> str:
    """Return the topic of a table's changelog."""
    return f"{app_id}-{table}-changelog"


class LiveWallet:
    """Takes records in, gives rows out. `verifier` checks commands; without one they are shown as they come.

    `app_id` names the changelog topics, as in the worker's settings.
    """

    def __init__(self, app_id: str = "spendfuse", verifier: Verifier | None = None) -> None:
        self.scopes_topic = changelog(app_id, "scopes")
        self.shared_topic = changelog(app_id, "shared")
        self.unseen = 0
        self.unreadable = 0
        self._verifier = verifier
        self._agents: dict[str, _Stored] = {}
        self._shared: dict[str, _Stored] = {}
        self._budgets: dict[str, Budget] = {}
        self._workspaces: dict[str, WorkspaceSettings] = {}
        self._policies: Policies | None = None
        self._rulings: dict[str, Command] = {}
        self._beats: dict[str, tuple[Heartbeat, int]] = {}

    @property
    def topics(self) -> tuple[str, ...]:
        """The topics whose records it wants; the changelogs exist once a worker has run."""
        return (BUDGETS.name, COMMANDS.name, HEARTBEATS.name, self.scopes_topic, self.shared_topic)

    @property
    def policies(self) -> Policies:
        """The budgets in force."""
        if self._policies is None:
            self._policies = Policies(self._budgets.values(), self._workspaces.values())
        return self._policies

    def on_record(self, record: Record) -> None:
        """Take in one record of any of `topics`; one that cannot be read changes nothing."""
        if record.topic == self.scopes_topic:
            # Agents only: the other scopes of that table are one partition's share, and the shared table has the sum.
            self._state(record, self._agents, agents=True)
        elif record.topic == self.shared_topic:
            self._state(record, self._shared, agents=False)
        elif record.topic == BUDGETS.name:
            self._budget(record)
        elif record.topic == COMMANDS.name:
            self._command(record)
        elif record.topic == HEARTBEATS.name:
            self._heartbeat(record)

    def rows(self, now_us: int, *, unbudgeted: bool = False) -> list[WalletRow]:
        """Return a row for each cap of each scope, the fullest first.

        `unbudgeted` adds the scopes without a cap: budget and cap empty, `cap_amount` 0, the month's spend.
        """
        by_hand = self._halted_by_hand(now_us)
        rows: list[WalletRow] = []
        for scope in [*self._agents, *self._shared]:
            policy = self.policies.of(scope)
            if not policy.limits and not unbudgeted:
                continue
            money = self._money(scope, now_us)
            if money is None:
                continue
            zone = self.policies.zones.get(scope_workspace(scope), "UTC")
            found = wallet_rows(scope, policy, money.spend, money.held, money.fuses, zone=zone, now_us=now_us)
            if not found:
                found = [_uncapped(scope, money, zone, now_us)]
            halt = next((by_hand[above] for above in _above(scope) if above in by_hand), None)
            if halt is not None:
                until_us = to_us(halt.expires_at) if halt.expires_at is not None else None
                look: FuseLook = "held"
                found = [row._replace(state=look, until_us=until_us) for row in found]
            rows += found
        rows.sort(key=lambda row: (-row.used, row.scope, row.budget, row.cap))
        return rows

    def header(self, now_us: int, wall_ms: int) -> WalletHeader:
        """Return what stands above the rows; `wall_ms` is the machine's time, by which heartbeats age."""
        signs = tuple(
            WorkerSign(beat, max(0, wall_ms - said_ms))
            for _, (beat, said_ms) in sorted(self._beats.items())
            if wall_ms - said_ms < WORKER_GONE_MS
        )
        return WalletHeader(
            now_us=now_us,
            workers=signs,
            budgets=len(self._budgets),
            scopes=len(self._agents) + len(self._shared),
            price_book=next((sign.beat.price_book for sign in signs), ""),
            lag=sum(sign.beat.lag for sign in signs),
            halts=tuple(self.halts(now_us)),
            unseen=self.unseen,
            unreadable=self.unreadable,
        )

    def halts(self, now_us: int) -> list[Command]:
        """Return the halts in force, of persons and of caps, by scope."""
        return sorted(
            (command for command in self._rulings.values() if command.action == "halt" and _holds(command, now_us)),
            key=lambda command: command.key,
        )

    def _halted_by_hand(self, now_us: int) -> dict[str, Command]:
        return {
            command.scope: command
            for command in self.halts(now_us)
            if command.budget == MANUAL_BUDGET and command.cap == MANUAL_CAP
        }

    def _state(self, record: Record, into: dict[str, _Stored], *, agents: bool) -> None:
        try:
            _, scope = split_state_key(record.key or b"")
        except ValueError:
            self.unreadable += 1
            return
        if (scope_kind(scope) == "agent") is not agents:
            return
        if record.value is None:
            into.pop(scope, None)
        elif scope not in into and _SCOPE.fullmatch(scope) is None:
            self.unreadable += 1
        elif scope not in into and len(into) >= SCOPES_MAX:
            self.unseen += 1
        else:
            into[scope] = _Stored(record.value)

    def _money(self, scope: str, now_us: int) -> _Money | None:
        """Return a scope's sums; None (and counted) when this version cannot read them."""
        try:
            if scope_kind(scope) == "agent":
                agent = self._agents[scope]
                state = agent.agent = agent.agent or decode_scope(agent.value)
                return _Money(state.spend, Held(*state.spend.held(now_us)), state.fuses)
            stored = self._shared[scope]
            shared = stored.shared = stored.shared or decode_shared(stored.value)
        except UnreadableStateError:
            self.unreadable += 1
            (self._agents if scope_kind(scope) == "agent" else self._shared).pop(scope, None)
            return None
        return _Money(merged(part.spend for part in shared.parts.values()), held_by(shared, now_us), shared.fuses)

    def _budget(self, record: Record) -> None:
        name = (record.key or b"").decode("utf-8", "replace")
        self._policies = None
        if record.value is None:
            self._budgets.pop(name, None)
            if name.startswith(WORKSPACE_KEY):
                self._workspaces.pop(name.removeprefix(WORKSPACE_KEY), None)
            return
        try:
            said = decode_budget(record.key, record.value)
        except ValueError:
            self.unreadable += 1  # the worker refuses it too: what was in force stays in force
            return
        if isinstance(said, WorkspaceSettings):
            self._workspaces[said.workspace] = said
        elif said.id in self._budgets or len(self._budgets) < BUDGETS_MAX:
            self._budgets[said.id] = said

    def _command(self, record: Record) -> None:
        try:
            command = accept(record, self._verifier, unsigned=self._verifier is None)
        except Refused:
            return  # a guard would not obey it either
        before = self._rulings.get(command.key)
        if command.action == "warn" or (before is not None and command.seq <= before.seq):
            return
        if before is not None or len(self._rulings) < COMMANDS_MAX:
            self._rulings[command.key] = command

    def _heartbeat(self, record: Record) -> None:
        try:
            beat = Heartbeat.model_validate_json(record.value or b"")
        except ValidationError:
            return
        if beat.emitter in self._beats or len(self._beats) < WORKERS_MAX:
            self._beats[beat.emitter] = (beat, record.timestamp_ms)


def _above(scope: str) -> tuple[str, ...]:
    """Return the scopes whose halt stops this one, itself first; an agent's runs are not known here."""
    kind, _, path = scope.partition(":")
    if kind == "agent":
        workspace, team, agent = path.split("/", 2)
        return ancestors(workspace, team, agent, None)
    return (scope,) if kind == "workspace" else (scope, f"workspace:{scope_workspace(scope)}")


def _holds(command: Command, now_us: int) -> bool:
    return command.expires_at is None or to_us(command.expires_at) > now_us


def _uncapped(scope: str, money: _Money, zone: str, now_us: int) -> WalletRow:
    """Return the row of a scope without a cap: the running month's spend, or a run's whole spend."""
    window = RUN_KEY if scope_kind(scope) == "run" else calendar_window("month", zone, now_us).key
    spent = money.spend.in_window(window)[NANOS]
    label = "run" if window == RUN_KEY else "month"
    burn = burn_per_hour(money.spend, zone, now_us, NANOS)
    return WalletRow(
        scope, "", "", label, UNBUDGETED_UNIT, spent, spent + money.held.nanos, 0, 0, burn, None, "armed", None
    )
