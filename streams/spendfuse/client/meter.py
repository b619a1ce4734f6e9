"""Emitting usage: `record()` after every model call; it never waits for the broker and never fails because of it.

meter = Meter.from_env()          # SPENDFUSE_WORKSPACE, _TEAM, _AGENT, _BOOTSTRAP_SERVERS
meter.record(provider="openai", model="gpt-5", input=1200, output=250)
"""

import asyncio
import logging
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final, NamedTuple, Self

from spendfuse.client.background import BACKGROUND
from spendfuse.client.clock import Clock, parse_clock, wall_clock
from spendfuse.client.emitted import EMITTED
from spendfuse.client.environment import check_names, own
from spendfuse.client.identity import Identity
from spendfuse.client.outbox import Message, Outbox
from spendfuse.settings import BrokerSettings, ClockSettings, IdentitySettings, MeterSettings
from spendfuse.wire.base import encode, from_us
from spendfuse.wire.cloudevents import headers
from spendfuse.wire.topics import USAGE
from spendfuse.wire.usage import PACK_MAX, Kind, Tokens, Usage

PACK_BYTES_MAX: Final = 900_000
"""Bytes of one pack: under a broker's usual megabyte, with room for the key and headers."""
SOURCE: Final = "spendfuse-python"

_PACK_HEAD: Final = b'{"v":1,"usages":['
_PACK_TAIL: Final = b"]}"
_log = logging.getLogger("spendfuse")


class MeterStats(NamedTuple):
    """What became of the usages emitted: `emitted == sent + dropped + buffered`."""

    emitted: int
    sent: int
    dropped: int
    buffered: int
    send_errors: int


class Meter:
    """Buffers usages and sends them from the background thread, in order for each agent.

    Nothing here waits for the broker but `flush` and `close`. While it is away, `meter_buffer_max` usages are kept;
    beyond it the oldest are dropped, counted in `stats` and warned of. A process that ends flushes for at most
    `meter_flush_timeout_s`; one that is killed loses what it had buffered (the linger, when all is well).
    All methods may be called from any thread; a forked child starts with an empty buffer.
    """

    def __init__(
        self,
        identity: IdentitySettings,
        broker: BrokerSettings | None = None,
        settings: MeterSettings | None = None,
        clock: Clock = wall_clock,
    ) -> None:
        self.identity = Identity.of(identity)
        self._settings = settings or MeterSettings.from_env({})
        self._clock = clock
        self._outbox: Outbox[Usage] = Outbox(
            *(broker or BrokerSettings.from_env({}), USAGE.name, pack),
            client_id="spendfuse-meter",
            buffer_max=self._settings.meter_buffer_max,
            linger_s=self._settings.meter_linger_ms / 1_000,
        )
        self._dropped_said = 0
        self._last_flush_failed = False
        BACKGROUND.enter(self)

    @classmethod
    def from_env(cls, **overrides: object) -> Self:
        """Return a meter with the settings of the environment, or of the keyword arguments in their place.

        Raises SettingsError with every fault of a group of settings at once.
        """
        check_names(overrides, IdentitySettings, BrokerSettings, MeterSettings, ClockSettings)
        return cls(
            IdentitySettings.from_env(None, **own(overrides, IdentitySettings)),
            BrokerSettings.from_env(None, **own(overrides, BrokerSettings)),
            MeterSettings.from_env(None, **own(overrides, MeterSettings)),
            parse_clock(ClockSettings.from_env(None, **own(overrides, ClockSettings)).clock),
        )

    def record(
        self,
        *,
        provider: str,
        model: str,
        tokens: Tokens | None = None,
        input: int = 0,  # noqa: A002 - the counter's name on the wire
        cache_read: int = 0,
        cache_write_5m: int = 0,
        cache_write_1h: int = 0,
        output: int = 0,
        reasoning: int = 0,
        id: str | None = None,  # noqa: A002 - the same
        ts: datetime | None = None,
        kind: Kind = "finished",
        deadline: datetime | None = None,
        tier: str = "standard",
        workflow: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Usage:
        """Emit the usage of one model call and return it.

        The counters are disjoint, in tokens: `input` is what no cache served (see `extract` for providers'
        responses). Give `tokens` or the counters, not both. `started`, `progress` and `finished` of one call share
        an `id`; without one it is new. `ts` is the end of the call, now by default. Raises ValueError for a usage
        that is not valid (pydantic's ValidationError is one).
        """
        counters = {
            "input": input,
            "cache_read": cache_read,
            "cache_write_5m": cache_write_5m,
            "cache_write_1h": cache_write_1h,
            "output": output,
            "reasoning": reasoning,
        }
        if tokens is not None and any(counters.values()):
            raise ValueError("give tokens, or single counters, not both")
        usage = self.usage(
            provider=provider,
            model=model,
            tokens=tokens if tokens is not None else Tokens(**counters),
            id=id if id is not None else f"{SOURCE}:{uuid.uuid4().hex}",
            ts=ts,
            kind=kind,
            deadline=deadline,
            tier=tier,
            workflow=workflow,
            tags=tags,
        )
        self.emit(usage)
        return usage

    def usage(
        self,
        *,
        provider: str,
        model: str,
        tokens: Tokens,
        id: str,  # noqa: A002 - the name on the wire
        ts: datetime | None = None,
        kind: Kind = "finished",
        deadline: datetime | None = None,
        tier: str = "standard",
        workflow: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Usage:
        """Return a usage of this meter's agent and run without emitting it. Raises ValueError as `record` does."""
        identity = self.identity
        return Usage(
            id=id,
            ts=ts if ts is not None else from_us(self._clock()),
            kind=kind,
            workspace=identity.workspace,
            team=identity.team,
            agent=identity.agent,
            run=identity.run,
            root_run=identity.root_run,
            parent_run=identity.parent_run,
            workflow=workflow,
            provider=provider,
            model=model,
            tier=tier,
            tokens=tokens,
            deadline=deadline,
            source=SOURCE,
            tags=dict(tags or {}),
        )

    def emit(self, usage: Usage) -> None:
        """Emit a usage, of any agent. After `close` it is dropped, counted and warned of."""
        EMITTED.tell(usage)  # before it is stamped: a guard's count must not be later than the usage
        if not self._outbox.put(usage):
            self._say_dropped("it was emitted after the meter was closed")

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until everything emitted is acknowledged by the broker; return whether it is, within the time.

        `timeout_s` is `meter_flush_timeout_s` by default.
        """
        return self._outbox.flush(self._settings.meter_flush_timeout_s if timeout_s is None else timeout_s)

    @property
    def stats(self) -> MeterStats:
        """Return what became of the usages emitted so far."""
        return MeterStats(*self._outbox.counts())

    def close(self, timeout_s: float | None = None) -> bool:
        """Flush and end; return whether everything emitted was sent. What was not is counted and warned of."""
        timeout_s = self._settings.meter_flush_timeout_s if timeout_s is None else timeout_s
        BACKGROUND.leave(self)
        self._outbox.close(timeout_s)
        self._say_dropped(f"not sent within {timeout_s:g} s, or pushed out of the full buffer")
        return self.stats.dropped == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await asyncio.to_thread(self.close)

    def finish(self, *, last: bool) -> None:
        """Flush, or close for good: the process ends."""
        if not last:
            self._last_flush_failed = not self.flush()
            return
        # Having waited in vain once, the process is not kept a second time.
        self.close(0.0 if self._last_flush_failed else None)

    def forked(self) -> None:
        """Start with an empty buffer: this is a forked child, and the parent sends what it held."""
        self._outbox.forked()
        self._dropped_said = 0
        self._last_flush_failed = False

    def _say_dropped(self, why: str) -> None:
        dropped = self.stats.dropped
        if dropped > self._dropped_said:
            self._dropped_said = dropped
            _log.warning("spendfuse dropped %d usages (%s): that money is not accounted for", dropped, why)


def pack(usages: Sequence[Usage]) -> list[Message[Usage]]:
    """Return messages of `usage.v1`: each agent's usages in order, packed up to PACK_MAX and PACK_BYTES_MAX.

    A single usage is sent as it is; a pack carries usages of one agent only, so that its key tells the truth.
    """
    by_agent: dict[str, list[Usage]] = {}
    for usage in usages:
        by_agent.setdefault(usage.agent_path, []).append(usage)
    messages = []
    for path, of_agent in by_agent.items():
        chunk: list[Usage] = []
        parts: list[bytes] = []
        size = 0
        for usage in of_agent:
            part = encode(usage)
            if chunk and (len(chunk) == PACK_MAX or size + len(part) > PACK_BYTES_MAX):
                messages.append(_message(path, chunk, parts))
                chunk, parts, size = [], [], 0
            chunk.append(usage)
            parts.append(part)
            size += len(part) + 1
        messages.append(_message(path, chunk, parts))
    return messages


def _message(path: str, usages: list[Usage], parts: list[bytes]) -> Message[Usage]:
    # Joined from usages already encoded: the bytes are those of encode(UsagePack(...)), at half the cost.
    single = len(parts) == 1
    value = parts[0] if single else _PACK_HEAD + b",".join(parts) + _PACK_TAIL
    kind = "usage.v1" if single else "usage.pack.v1"
    first = usages[0]
    return Message(path.encode(), value, headers(kind, f"/agents/{path}", first.id, first.ts), usages)
