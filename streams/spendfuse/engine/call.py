"""One call as the meter takes it: what was used, by whom, when, and where it came from.

The meter reads usages by the ten thousand a second, so what it needs of each is laid out once, where it is decoded.
"""

from typing import NamedTuple, Protocol

from spendfuse.wire.base import encode, to_us
from spendfuse.wire.packed import INDEX_BITS, PackedUsage
from spendfuse.wire.scopes import agent_scope, shared_scopes


class Counters(Protocol):
    """Disjoint token counters, as `wire.usage.Tokens` has them."""

    @property
    def input(self) -> int: ...  # noqa: D102 - as in Tokens, like the ones below
    @property
    def cache_read(self) -> int: ...  # noqa: D102
    @property
    def cache_write_5m(self) -> int: ...  # noqa: D102
    @property
    def cache_write_1h(self) -> int: ...  # noqa: D102
    @property
    def output(self) -> int: ...  # noqa: D102


class Used(Protocol):
    """What of a validated usage decides its price and its id, as `wire.usage.Usage` has it."""

    @property
    def id(self) -> str: ...  # noqa: D102 - as in Usage, like the ones below
    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def provider(self) -> str: ...  # noqa: D102
    @property
    def model(self) -> str: ...  # noqa: D102
    @property
    def tier(self) -> str: ...  # noqa: D102
    @property
    def tokens(self) -> Counters: ...  # noqa: D102


class Who(NamedTuple):
    """An agent within a run tree: its path, its own scope, and those it shares (team, workspace, run)."""

    path: str
    agent: str
    shared: tuple[str, str, str]


class Call(NamedTuple):
    """A validated usage on its way through the meter; instants are microseconds since the epoch.

    `position` is the offset and the place in the record as one integer, the unit of every watermark; `body` is the
    usage as JSON, as the ledger will hold it.
    """

    used: Used
    who: Who
    ts_us: int
    deadline_us: int | None
    partition: int
    offset: int
    nth: int
    position: int
    produced_at_ms: int
    tokens: int
    body: bytes

    @classmethod
    def of(cls, packed: PackedUsage) -> "Call":
        """Return a packed usage as a call."""
        usage = packed.u
        who = Who(usage.agent_path, agent_scope(usage.workspace, usage.team, usage.agent), shared_scopes(usage))
        deadline_us = to_us(usage.deadline) if usage.deadline else None
        return cls(
            usage, who, to_us(usage.ts), deadline_us, packed.p, packed.o, packed.i, (packed.o << INDEX_BITS) | packed.i,
            packed.t, usage.tokens.total, encode(usage),
        )  # fmt: skip
