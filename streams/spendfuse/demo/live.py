"""The live wallet while a demo runs: what `spendfuse status` shows, refreshed in place, under the demo's own clock."""

from types import TracebackType
from typing import Final, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from spendfuse.client.clock import ScaledClock, wall_clock
from spendfuse.client.follow import Follower
from spendfuse.client.keys import Verifier
from spendfuse.embedded.stack import EmbeddedStack
from spendfuse.engine.sentences import money
from spendfuse.engine.windows import HOUR_US
from spendfuse.pipeline.wallet import LiveWallet
from spendfuse.pipeline.wallet_view import render
from spendfuse.wire.base import from_us

US_PER_MS: Final = 1_000
ROWS_SPARE: Final = 10
"""Lines of the screen that are not rows of the wallet."""
ROWS_MIN: Final = 5
REFRESHES_PER_S: Final = 5


class LiveView:
    """Follows the stack's topics and draws the wallet; without a terminal it draws nothing, and says how it goes."""

    def __init__(
        self, console: Console, stack: EmbeddedStack, clock: ScaledClock, start_us: int, span_us: int, *, show: bool
    ) -> None:
        """Take where to draw, what to follow, and the event time (us) that the demo spans."""
        self._console = console
        self._clock = clock
        self._start_us = start_us
        self._span_us = span_us
        self._wallet = LiveWallet(verifier=Verifier.parse(stack.public_keys))
        self._followers = [
            Follower(stack.broker, topic, self._wallet.on_record, client_id="spendfuse-demo")
            for topic in self._wallet.topics
        ]
        self._progress = Progress(TextColumn("{task.description}"), BarColumn(40), TextColumn("{task.fields[says]}"))
        self._task = self._progress.add_task("event time", total=span_us, says="")
        self._live = Live(console=console, refresh_per_second=REFRESHES_PER_S, transient=True) if show else None

    async def __aenter__(self) -> Self:
        """Start following and drawing."""
        for follower in self._followers:
            follower.start()
        if self._live is not None:
            self._live.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop both, and leave the last picture on the screen."""
        if self._live is not None:
            last = self._live.get_renderable()
            self._live.stop()
            if kind is None:
                self._console.print(last)
        for follower in self._followers:
            await follower.stop()

    def refresh(self, stopped: int) -> None:
        """Draw the present state; `stopped` agents have ended."""
        if self._live is None:
            return
        now_us = self._clock()
        gone_us = min(now_us - self._start_us, self._span_us)
        rows = self._wallet.rows(now_us)
        spent = sum(row.spend for row in rows if row.scope.startswith("agent:") and row.unit == "nano-USD")
        says = f"{gone_us / HOUR_US:.1f} h, {from_us(now_us):%a %H:%M}   {money(spent, 'USD')} spent"
        self._progress.update(self._task, completed=gone_us, says=says)
        limit = max(ROWS_MIN, self._console.height - ROWS_SPARE)
        head = Text(f"{stopped} agents stopped", style="bold red" if stopped else "bold")
        header = self._wallet.header(now_us, wall_clock() // US_PER_MS)
        self._live.update(Group(render(rows, header, limit=limit), self._progress, head))
