"""What a guard does that hears nothing: whether it still knows enough, and for how long its agent may go on."""

from enum import StrEnum
from time import monotonic
from typing import Final

from spendfuse.client.halted import Halted
from spendfuse.client.lease import NONE, Lease
from spendfuse.engine.sentences import amount
from spendfuse.settings import GuardSettings

LOOK_AGAIN_S: Final = 0.05
"""How often a guard that hears nothing looks at its grace again, while nothing is emitted."""
_NEVER: Final = float("-inf")
_ALWAYS: Final = float("inf")


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


class Silence:
    """How long no worker was heard of, and what its guard's `fail_mode` makes of that. The guard's lock protects it."""

    def __init__(self, agent: str, bootstrap_servers: str, settings: GuardSettings) -> None:
        """Take whose guard it is (its scope), and which broker it listens to."""
        self.commands_read = False
        self._agent = agent
        self._bootstrap_servers = bootstrap_servers
        self._settings = settings
        self._last_sign = _NEVER
        self._grace_from: tuple[float, int] | None = None

    def heard(self, age_s: float) -> None:
        """Note a worker's sign of life of some seconds ago."""
        self._last_sign = max(self._last_sign, monotonic() - age_s)
        if self.state is GuardState.LIVE:
            self._grace_from = None

    @property
    def state(self) -> GuardState:
        """Return what the guard knows at present."""
        if not self.commands_read:
            return GuardState.SYNCING
        silence_s = monotonic() - self._last_sign
        if silence_s > self._settings.blind_after_s:
            return GuardState.BLIND
        return GuardState.STALE if silence_s > self._settings.stale_after_s else GuardState.LIVE

    def nothing_to_do_until(self) -> float:
        """Return until when (monotonic seconds) silence alone changes nothing."""
        if self._settings.fail_mode == "closed":
            return self._last_sign + self._settings.blind_after_s
        if self._settings.fail_mode == "bounded":
            return self._last_sign + self._settings.stale_after_s
        return _ALWAYS

    def judge(self, lease: Lease, tokens: int, now_us: int) -> tuple[Halted | None, float | None]:
        """Return why the agent may not go on, and until when (monotonic seconds) nothing changes, where that is known.

        `tokens` are those that the agent has used since the guard began.
        """
        if self._settings.fail_mode == "open":
            return None, None
        state = self.state
        if self._settings.fail_mode == "bounded":
            return self._out_of_bounds(state, lease, tokens, now_us)
        if state is GuardState.SYNCING:
            return Halted(f"{self._agent} may not start: {self._unread()}, and fail_mode is closed"), None
        if state is GuardState.BLIND:
            return Halted(f"{self._agent} must stop: {self._heard_nothing()}, and fail_mode is closed"), None
        return None, None

    def _out_of_bounds(
        self, state: GuardState, lease: Lease, tokens: int, now_us: int
    ) -> tuple[Halted | None, float | None]:
        if state is GuardState.LIVE:
            self._grace_from = None  # what was used meanwhile is counted by the worker now
            return None, None
        room = lease.no_room(NONE, now_us)
        if room is not None:
            left = room.remaining
            return Halted(
                f"{self._agent} must stop: {self._heard_nothing()}, and its own calls have since used up what was left "
                f"of {left.scope}'s cap of {amount(left.amount, left.unit)} ({left.budget}, cap {left.cap})"
            ), None
        now = monotonic()
        # Only a usage, or time, can change the answer.
        if state is GuardState.STALE:
            return None, now + LOOK_AGAIN_S
        if self._grace_from is None:
            self._grace_from = (now, tokens)
        since, tokens_before = self._grace_from
        used = tokens - tokens_before
        settings = self._settings
        if now - since < settings.grace_s and used <= settings.grace_tokens:
            return None, min(now + LOOK_AGAIN_S, since + settings.grace_s)
        why = self._unread() if state is GuardState.SYNCING else self._heard_nothing()
        return Halted(
            f"{self._agent} must stop: {why}, and the grace of {settings.grace_s:g} s and {settings.grace_tokens:,} "
            f"tokens is used up ({now - since:.0f} s, {used:,} tokens). It goes on at the first sign of life"
        ), None

    def _unread(self) -> str:
        return f"the commands at {self._bootstrap_servers} could not be read within {self._settings.sync_timeout_s:g} s"

    def _heard_nothing(self) -> str:
        silence_s = monotonic() - self._last_sign
        known = f"{silence_s:.1f} s" if silence_s < _ALWAYS else f"{self._settings.blind_after_s:g} s"
        return f"no sign of life from a spendfuse worker at {self._bootstrap_servers} for {known}"
