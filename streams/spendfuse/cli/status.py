"""`spendfuse status`: the live wallet in the terminal."""

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from spendfuse.cli.options import STATE_DIR, Json, Servers, StateDir, command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType
    from rich.text import Text

    from spendfuse.audit.lag import LedgerLag
    from spendfuse.cli.target import Target
    from spendfuse.engine.wallet import WalletRow
    from spendfuse.pipeline.wallet import LiveWallet, WalletHeader

INTERVAL_S_DEFAULT: Final = 1.0
LIMIT_DEFAULT: Final = 40
TRAIL_LOOK_S: Final = 5.0
BEHIND_S_MAX: Final = 60
"""As old as a ledger message may be before it is in ClickHouse; a batch waits for a second at most."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(
        app,
        status,
        "spendfuse status",
        "spendfuse status --scope 'agent:acme/research/*' --limit 10",
        "spendfuse status --once --json",
        "spendfuse status --all   (also scopes without a budget)",
    )


def status(
    watch: Annotated[
        bool | None,
        typer.Option("--watch/--once", help="Refresh in place until Ctrl-C, or show it once; watch on a terminal."),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Only these: agent:acme/research/*, or a part of the name."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Rows shown, the fullest first.")] = LIMIT_DEFAULT,
    everything: Annotated[bool, typer.Option("--all", help="Also scopes without a budget.")] = False,
    interval: Annotated[float, typer.Option(min=0.2, max=60.0, help="Seconds between refreshes.")] = INTERVAL_S_DEFAULT,
    bootstrap_servers: Servers = None,
    state_dir: StateDir = STATE_DIR,
    as_json: Json = False,
) -> None:
    """Show what each scope has spent of what it may spend: spend, cap, burn rate, runway, and the state of its fuse.

    It reads the worker's own topics without a consumer group, so looking disturbs nobody.
    """
    from spendfuse.cli import console, kafka, target
    from spendfuse.pipeline.wallet import LiveWallet

    where = target.find(bootstrap_servers, state_dir)
    wallet = LiveWallet(where.operator.app_id, where.verifier())
    trail = _Trail(where)
    show = _Show(wallet, where, trail, scope, None if as_json else limit, everything=everything, as_json=as_json)
    watching = watch if watch is not None else console.out().is_terminal and not as_json
    try:
        kafka.run(_watch(where, wallet, show, trail, interval) if watching else _once(where, wallet, show, trail))
    except KeyboardInterrupt:
        if not watching:
            raise


def render(rows: "Sequence[WalletRow]", header: "WalletHeader", *, limit: int | None = None) -> "RenderableType":
    """Return the wallet as something rich can print; it adapts to the width it is given."""
    from spendfuse.pipeline import wallet_view

    return wallet_view.render(rows, header, limit=limit)


class _Trail:
    """How far ClickHouse is behind the ledger, as Kafka says: also when the audit process or every worker is dead."""

    def __init__(self, where: "Target") -> None:
        self._where = where
        self.lag: LedgerLag | None = None

    async def look(self) -> None:
        """Ask once; None where it cannot be known, which stops nobody from seeing the rest."""
        from aiokafka.errors import KafkaError

        from spendfuse.wire.topics import LEDGER

        if self._where.up is not None and self._where.up.clickhouse_directory is None:
            return
        try:
            from spendfuse.audit.lag import ledger_lag

            self.lag = await ledger_lag(self._where.broker, ledger=LEDGER.name)
        except (ModuleNotFoundError, KafkaError, OSError, TimeoutError):
            self.lag = None

    async def follow(self) -> None:
        """Ask for ever."""
        import asyncio

        while True:
            await self.look()
            await asyncio.sleep(TRAIL_LOOK_S)


def trail_data(lag: "LedgerLag | None", now_ms: int) -> dict[str, Any] | None:
    """Return the audit's lag as plain data; None where no audit has ever run, or it cannot be known."""
    if lag is None or not lag.begun:
        return None
    age_s = lag.age_s(now_ms)
    return {"messages": lag.messages, "oldest_s": age_s, "behind": age_s > BEHIND_S_MAX}


def trail_line(lag: "LedgerLag | None", now_ms: int) -> "Text":
    """Return the audit's lag for a person."""
    from rich.text import Text

    said = trail_data(lag, now_ms)
    if said is None:
        return Text("audit: none has written here yet", style="dim")
    if not said["messages"]:
        return Text("audit: ClickHouse has every message of the ledger", style="green")
    found = f"audit: {said['messages']:,} ledger messages are not in ClickHouse, the oldest for {said['oldest_s']:,} s"
    return Text(found, style="yellow" if said["behind"] else "")


class _Show:
    """How the wallet is shown: filtered, and as a table or JSON."""

    def __init__(
        self,
        wallet: "LiveWallet",
        where: "Target",
        trail: _Trail,
        scope: str | None,
        limit: int | None,
        *,
        everything: bool,
        as_json: bool,
    ) -> None:
        from spendfuse.cli.target import wall_ms

        self.as_json = as_json
        self._wallet = wallet
        self._trail = trail
        self._clock = where.clock
        self._wall_ms = wall_ms
        self._scope = scope
        self._limit = limit
        self._everything = everything

    def now(self) -> "tuple[list[WalletRow], WalletHeader]":
        """Return the rows and header of this moment."""
        now_us = self._clock()
        rows = self._wallet.rows(now_us, unbudgeted=self._everything)
        if self._scope is not None:
            rows = [row for row in rows if concerns(self._scope, row.scope)]
        return rows, self._wallet.header(now_us, self._wall_ms())

    def table(self) -> "RenderableType":
        """Return the wallet of this moment for a person."""
        from rich.console import Group

        rows, header = self.now()
        return Group(trail_line(self._trail.lag, self._wall_ms()), render(rows, header, limit=self._limit))

    def print(self) -> None:
        """Print the wallet of this moment."""
        from spendfuse.cli import console

        rows, header = self.now()
        if self.as_json:
            console.data(as_data(rows, header) | {"audit": trail_data(self._trail.lag, self._wall_ms())})
            return
        console.out().print(trail_line(self._trail.lag, self._wall_ms()))
        console.out().print(render(rows, header, limit=self._limit))
        if not rows:
            console.note(_nothing(header, everything=self._everything, scope=self._scope))


def concerns(pattern: str, scope: str) -> bool:
    """Say whether a scope is one of a pattern's, or has it as a part of its name."""
    from spendfuse.wire.scopes import SCOPE_KINDS, matches, scope_kind

    return matches(pattern, scope) if scope_kind(pattern) in SCOPE_KINDS and ":" in pattern else pattern in scope


def as_data(rows: "Sequence[WalletRow]", header: "WalletHeader") -> dict[str, Any]:
    """Return the wallet as plain data: amounts are integers of `unit`, `used` is in 1/10,000 of the cap."""
    from spendfuse.wire.base import from_us, rfc3339

    def instant(us: int | None) -> str | None:
        # The end of a fuse without end lies beyond the calendar.
        return None if us is None or us > _CALENDAR_END_US else rfc3339(from_us(us))

    return {
        "now": instant(header.now_us),
        "workers": [
            {
                "emitter": sign.beat.emitter,
                "ready": sign.beat.ready,
                "stale": sign.beat.stale,
                "age_ms": sign.age_ms,
                "lag": sign.beat.lag,
            }
            for sign in header.workers
        ],
        "lag": header.lag,
        "price_book": header.price_book,
        "budgets": header.budgets,
        "scopes": header.scopes,
        "unseen": header.unseen,
        "unreadable": header.unreadable,
        "halts": [halt.model_dump(mode="json", exclude_none=True) for halt in header.halts],
        "rows": [row._asdict() | {"until": instant(row.until_us)} for row in rows],
    }


_CALENDAR_END_US: Final = 253_000_000_000_000_000


def _nothing(header: "WalletHeader", *, everything: bool, scope: str | None) -> str:
    if scope is not None:
        return f"no row for {scope}: leave out --scope to see which there are"
    if not header.scopes:
        return "no usage has been metered yet: emit some with `spendfuse usage emit`"
    if not everything:
        return f"{header.scopes:,} scopes have spent and no budget covers any: see them with --all, or apply budgets"
    return "nothing to show"


async def _once(where: "Target", wallet: "LiveWallet", show: _Show, trail: _Trail) -> None:
    from spendfuse.cli import kafka

    counts = await kafka.partition_counts(where)
    await kafka.read_to_end(where, {topic: wallet.on_record for topic in wallet.topics if topic in counts})
    await trail.look()
    show.print()


async def _watch(where: "Target", wallet: "LiveWallet", show: _Show, trail: _Trail, interval_s: float) -> None:
    import asyncio
    import contextlib

    from rich.live import Live

    from spendfuse.cli import console, kafka
    from spendfuse.client.follow import Follower

    counts = await kafka.partition_counts(where)
    async with contextlib.AsyncExitStack() as stack:
        await trail.look()
        looking = asyncio.create_task(trail.follow(), name="audit lag")
        stack.callback(looking.cancel)
        followers = [
            await stack.enter_async_context(Follower(where.broker, topic, wallet.on_record, client_id=kafka.CLIENT_ID))
            for topic in wallet.topics
        ]
        async with kafka.reaching(where), asyncio.timeout(kafka.READ_TIMEOUT_S):
            for follower in followers:
                if follower.topic in counts:  # a changelog that no worker has made yet is waited for below
                    await follower.caught_up()
        if show.as_json or not console.out().is_terminal:
            while True:
                show.print()
                await asyncio.sleep(interval_s)
        with Live(show.table(), console=console.out(), auto_refresh=False) as live:
            while True:
                await asyncio.sleep(interval_s)
                live.update(show.table(), refresh=True)
