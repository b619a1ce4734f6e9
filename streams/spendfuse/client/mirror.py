"""A file that says which scopes are halted, for programs that cannot speak Kafka: hooks, scripts, other languages.

One process writes it (`spendfuse guard mirror`), any number read it (`spendfuse guard check`, see
`cli/guard_check.py`, or any reader of JSON). It is replaced as a whole, at once when something changes and every
second, so that a reader can tell when its writer has died. `closes_ms` is the wall time from which a reader must no
longer rely on it; its writer judges what has expired, so a reader's clock ends no halt.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any, Final

from spendfuse.client.accept import Refused, accept, accept_heartbeat
from spendfuse.client.clock import Clock, ScaledClock, TrustedTime, wall_clock
from spendfuse.client.follow import Follower, Record
from spendfuse.client.keys import Verifier
from spendfuse.client.memory import write_private
from spendfuse.client.obey import Obedience
from spendfuse.client.signs import Signs
from spendfuse.settings import BrokerSettings, GuardSettings
from spendfuse.wire.base import to_us
from spendfuse.wire.control import Command
from spendfuse.wire.topics import COMMANDS, HEARTBEATS

WRITE_INTERVAL_S: Final = 1.0
SAY_INTERVAL_S: Final = 30.0
"""A disk that stays full is said so often, not at every attempt."""
VERSION: Final = 1
_log = logging.getLogger("spendfuse")


class Mirror:
    """Follows every command of every scope, and keeps a file that says what holds.

    It acknowledges nothing: whoever stops an agent by it is not known to have done so.
    """

    def __init__(
        self,
        path: Path,
        broker: BrokerSettings,
        settings: GuardSettings,
        verifier: Verifier | None,
        clock: Clock = wall_clock,
    ) -> None:
        """Take where the file is and who may command; `verifier` is None only with `unsigned_commands`."""
        self.path = path
        self.written = 0
        self._broker = broker
        self._settings = settings
        self._verifier = verifier
        self._clock = clock
        self._time = TrustedTime(clock)
        self._obedience = Obedience(None)
        self._signs = Signs()
        self._started_at = self._last_sign = monotonic()
        self._heartbeats_read = False
        self._unwritten_said_at = float("-inf")
        self._changed = asyncio.Event()

    async def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Keep the file until cancelled; `on_ready` is called when it first says all that is known.

        Raises OSError when it cannot be written at all. What a full disk does not take later is tried again: meanwhile
        the file is old, and says itself from when it must not be relied on.
        """
        followers = [
            Follower(self._broker, COMMANDS.name, self._on_command, client_id="spendfuse-mirror"),
            Follower(
                *(self._broker, HEARTBEATS.name, self._on_heartbeat),
                client_id="spendfuse-mirror",
                on_caught_up=self._on_heartbeats_read,
            ),
        ]
        async with contextlib.AsyncExitStack() as stack:
            for follower in followers:
                await stack.enter_async_context(follower)
            # Before everything is read the file would say less than one that an earlier writer left.
            await followers[0].caught_up()
            self._write()
            on_ready()
            while True:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), WRITE_INTERVAL_S)
                self._changed.clear()
                self._write_or_say()

    def content(self) -> dict[str, Any]:
        """Return what the file says now."""
        verdict = self._obedience.strictest(self._time.now_us())
        now_ms = wall_clock() // 1_000
        closes_s = self._closes_s()
        return {
            "v": VERSION,
            "written_ms": now_ms,
            "closes_ms": None if closes_s is None else now_ms + int(closes_s * 1_000),
            "silence_s": round(monotonic() - self._last_sign, 3),
            "halts": [self._item(command) for command in verdict.halts],
            "degrades": [
                self._item(command)
                | {
                    "models": dict(command.degrade.models) if command.degrade else {},
                    "max_output_tokens": command.degrade.max_output_tokens if command.degrade else None,
                }
                for command in verdict.degrades
            ],
        }

    def _item(self, command: Command) -> dict[str, Any]:
        expires_ms = None
        if command.expires_at is not None:
            expires_us = to_us(command.expires_at)
            expires_ms = (
                self._clock.wall_us(expires_us) if isinstance(self._clock, ScaledClock) else expires_us
            ) // 1_000
        return {
            "scope": command.scope,
            "budget": command.budget,
            "cap": command.cap,
            "seq": command.seq,
            "expires_ms": expires_ms,
            "message": command.message or f"{command.scope} is halted by {command.budget}, cap {command.cap}",
        }

    def _closes_s(self) -> float | None:
        """Return for how long from now the file may be relied on if nothing more is heard."""
        if self._settings.fail_mode == "open":
            return None
        grace_s = self._settings.grace_s if self._settings.fail_mode == "bounded" else 0.0
        return self._last_sign + self._settings.blind_after_s + grace_s - monotonic()

    def _write(self) -> None:
        write_private(self.path, json.dumps(self.content(), separators=(",", ":")).encode(), durable=False)
        self.written += 1

    def _write_or_say(self) -> None:
        try:
            self._write()
        except OSError as error:
            if monotonic() - self._unwritten_said_at >= SAY_INTERVAL_S:
                self._unwritten_said_at = monotonic()
                _log.warning("spendfuse mirror cannot write %s: %s; readers stop trusting it", self.path, error)
            return
        if self._unwritten_said_at > float("-inf"):
            self._unwritten_said_at = float("-inf")
            _log.warning("spendfuse mirror writes %s again", self.path)

    def _on_command(self, record: Record) -> None:
        try:
            command = accept(record, self._verifier, unsigned=self._settings.unsigned_commands)
        except Refused as refusal:
            _log.warning("spendfuse mirror refused the command at offset %d: %s", record.offset, refusal)
            return
        if self._obedience.apply(command) == "ruling":
            self._changed.set()

    def _on_heartbeats_read(self) -> None:
        self._heartbeats_read = True

    def _on_heartbeat(self, record: Record) -> None:
        try:
            beat = accept_heartbeat(record, self._verifier, unsigned=self._settings.unsigned_commands)
        except Refused as refusal:
            if refusal.reason != "tombstone":
                _log.warning("spendfuse mirror refused the heartbeat at offset %d: %s", record.offset, refusal)
            return
        if not self._signs.is_news(beat):
            return  # recorded, and written again: no sign of life
        if beat.ready and not beat.stale and self._heartbeats_read:
            self._last_sign = monotonic()
            self._time.hear(to_us(beat.ts))
