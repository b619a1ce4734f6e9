"""The live wallet for a person: a header and a table, as wide as the terminal allows. Needs rich (the `cli` extra)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from spendfuse.engine.sentences import amount, instant
from spendfuse.engine.wallet import FuseLook, WalletRow
from spendfuse.pipeline.wallet import WalletHeader
from spendfuse.wire.budget import BASIS_POINTS, UNKNOWN_MODEL_CAP
from spendfuse.wire.control import MANUAL_BUDGET

STYLES: Final[dict[FuseLook, str]] = {
    "armed": "green",
    "warned": "yellow",
    "degraded": "magenta",
    "tripped": "bold red",
    "held": "bold red",
    "shadow": "dim",
}
BAR_CELLS: Final = 10
STALE_MS: Final = 15_000
"""A worker silent for so long is shown as stale, as guards take it, and so is one that says it of itself."""
HALTS_SHOWN_MAX: Final = 5
SCOPE_CELLS_MIN: Final = 24
PADDING: Final = 2
HOUR_S: Final = 3_600
DAY_S: Final = 86_400
MINUTE_S: Final = 60


@dataclass(frozen=True, slots=True)
class _Column:
    """A column; `rank` says which go first where there is no room, the highest; 0 stays."""

    name: str
    cell: Callable[[WalletRow, bool], Text]
    justify: Literal["left", "right"]
    rank: int


@dataclass(frozen=True, slots=True)
class WalletView:
    """A renderable of rows under a header; `limit` is how many rows are shown, None for all."""

    rows: Sequence[WalletRow]
    header: WalletHeader
    limit: int | None = None
    zone: str = "UTC"

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the header, the table, and what is not shown."""
        yield from header_lines(self.header, self.zone)
        shown = self.rows if self.limit is None else self.rows[: self.limit]
        if shown:
            yield _table(shown, options)
        if len(shown) < len(self.rows):
            yield Text(f"and {len(self.rows) - len(shown):,} more (--limit)", style="dim")


def render(rows: Sequence[WalletRow], header: WalletHeader, *, limit: int | None = None) -> WalletView:
    """Return the wallet as something rich can print; rows in the order given."""
    return WalletView(rows, header, limit)


def header_lines(header: WalletHeader, zone: str = "UTC") -> list[Text]:
    """Return the lines above the table: the clock, the workers, and the halts in force."""
    line = Text(instant(header.now_us, zone), style="bold")
    line.append(f"  {header.budgets:,} budgets, {header.scopes:,} scopes", style="not bold")
    if header.price_book:
        line.append(f", prices {header.price_book[:40]}", style="not bold")
    lines = [line, _workers(header)]
    # A cap's trip has a row; these have none.
    others = [halt for halt in header.halts if halt.budget == MANUAL_BUDGET or halt.cap == UNKNOWN_MODEL_CAP]
    for halt in others[:HALTS_SHOWN_MAX]:
        until = "until resumed" if halt.expires_at is None else f"until {halt.expires_at:%Y-%m-%d %H:%M} UTC"
        who = f"held {halt.scope} by {printable(halt.by)}" if halt.budget == MANUAL_BUDGET else f"halted {halt.scope}"
        why = f": {printable(halt.reason)}" if halt.reason else ""
        lines.append(Text(f"{who} {until}{why}", style=STYLES["held"]))
    if len(others) > HALTS_SHOWN_MAX:
        lines.append(Text(f"and {len(others) - HALTS_SHOWN_MAX} more halts", style="dim"))
    if header.unseen or header.unreadable:
        lines.append(Text(f"{header.unseen:,} scopes not shown, {header.unreadable:,} unreadable", style="yellow"))
    return lines


def _table(rows: Sequence[WalletRow], options: ConsoleOptions) -> Table:
    """Return the table with as many columns as fit; a scope's name is the one thing that is cut."""
    cells = {column.name: [column.cell(row, options.ascii_only) for row in rows] for column in _COLUMNS}
    widths = {name: max(len(name), *(text.cell_len for text in texts)) + PADDING for name, texts in cells.items()}
    widest_scope = widths["scope"]
    columns = list(_COLUMNS)
    while True:
        left = options.max_width - sum(widths[column.name] for column in columns if column.name != "scope")
        least = max(columns, key=lambda column: column.rank)
        if left >= min(widest_scope, SCOPE_CELLS_MIN) or not least.rank:
            break
        columns.remove(least)
    table = Table(box=None, padding=(0, PADDING, 0, 0), header_style="bold", pad_edge=False)
    for column in columns:
        width = max(1, min(widest_scope, left) - PADDING) if column.name == "scope" else None
        table.add_column(column.name, justify=column.justify, no_wrap=True, overflow="ellipsis", width=width)
    cells["scope"] = [Text(shortened(row.scope, max(1, min(widest_scope, left) - PADDING))) for row in rows]
    for nth in range(len(rows)):
        table.add_row(*(cells[column.name][nth] for column in columns))
    return table


def shortened(scope: str, width: int) -> str:
    """Return a scope in at most `width` characters: its kind and its end, which tell it from others."""
    kind = scope.partition(":")[0] + ":"
    if len(scope) <= width or width <= len(kind) + 1:
        return scope[:width]
    return f"{kind}…{scope[len(kind) + 1 + len(scope) - width :]}"


def _workers(header: WalletHeader) -> Text:
    if not header.workers:
        return Text("no worker has given a sign of life: nothing is metered, nobody is stopped", style="bold red")
    line = Text()
    for nth, sign in enumerate(header.workers):
        stale = sign.age_ms > STALE_MS or sign.beat.stale
        state = "stale" if stale else "ready" if sign.beat.ready else "not ready"
        name = sign.beat.emitter.partition("/")[2] or sign.beat.emitter
        line.append(", " if nth else "workers: ")
        line.append(f"{name} {state}", style="green" if state == "ready" else "bold red" if stale else "yellow")
        line.append(f" {sign.age_ms / 1_000:.1f} s ago")
    line.append(f"; lag {header.lag:,}", style="" if not header.lag else "yellow")
    return line


def printable(text: str) -> str:
    """Return text from outside without what a terminal would obey."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def runway_text(seconds: int | None) -> str:
    """Return a runway in its two largest units; `-` when nothing burns."""
    if seconds is None:
        return "-"
    if seconds >= DAY_S:
        return f"{seconds // DAY_S}d {seconds % DAY_S // HOUR_S}h" if seconds < 100 * DAY_S else "> 99d"
    if seconds >= HOUR_S:
        return f"{seconds // HOUR_S}h {seconds % HOUR_S // MINUTE_S}m"
    return f"{seconds // MINUTE_S}m {seconds % MINUTE_S}s" if seconds >= MINUTE_S else f"{seconds}s"


def _money(value: int, row: WalletRow) -> Text:
    return Text(amount(value, row.unit))


def _bar(row: WalletRow, ascii_only: bool) -> Text:
    if not row.cap_amount:
        return Text("")
    full, empty = ("#", "-") if ascii_only else ("━", "╌")
    cells = min(BAR_CELLS, row.used * BAR_CELLS // BASIS_POINTS)
    return Text(full * cells, style=STYLES[row.state]).append(empty * (BAR_CELLS - cells), style="dim")


def _used(row: WalletRow) -> Text:
    if not row.cap_amount:
        return Text("no cap", style="dim")
    return Text(
        f"{row.used // 100}.{row.used % 100 // 10} %", style="default" if row.state == "armed" else STYLES[row.state]
    )


_COLUMNS: Final = (
    _Column("scope", lambda row, _: Text(row.scope), "left", 0),
    _Column("budget/cap", lambda row, _: Text(f"{row.budget}/{row.cap}" if row.budget else "-"), "left", 2),
    _Column("window", lambda row, _: Text(row.window), "left", 4),
    _Column("spend", lambda row, _: _money(row.spend, row), "right", 0),
    _Column("committed", lambda row, _: _money(row.committed, row), "right", 6),
    _Column("cap", lambda row, _: _money(row.cap_amount, row) if row.cap_amount else Text("-"), "right", 0),
    _Column("used", lambda row, _: _used(row), "right", 0),
    _Column("", _bar, "left", 1),
    _Column("burn/h", lambda row, _: _money(row.burn, row), "right", 5),
    _Column("runway", lambda row, _: Text(runway_text(row.runway_s)), "right", 3),
    _Column("state", lambda row, _: Text(row.state, style=STYLES[row.state]), "left", 0),
)
