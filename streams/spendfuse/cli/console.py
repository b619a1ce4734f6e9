"""Standard output and error: tables and colour on a terminal, plain aligned text or JSON anywhere else."""

import json
import sys
from collections.abc import Sequence
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

Cell = str | tuple[str, str]
"""Text, or text and a style."""


PLAIN_WIDTH: Final = 240
"""The width of what has none: a pipe or a file."""


def out() -> Console:
    """Return the console of reports."""
    return _console(sys.stdout)


def err() -> Console:
    """Return the console of progress, notes and errors."""
    return _console(sys.stderr)


def _console(file: Any) -> Console:
    # No highlighting and no markup: what is printed is data, some of it from outside.
    console = Console(file=file, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


def printable_lines(text: str) -> Text:
    """Return text whose control characters, other than newlines, are replaced: a terminal would obey them."""
    return Text("".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text))


def line(text: str, style: str = "") -> None:
    """Print a line of a report."""
    out().print(printable_lines(text), style=style or None, soft_wrap=True)


def note(text: str, style: str = "dim") -> None:
    """Print a line beside a report, on standard error."""
    err().print(printable_lines(text), style=style, soft_wrap=True)


def data(value: Any) -> None:
    """Print a value as JSON: indented for a person, one line for a program."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2 if sys.stdout.isatty() else None) + "\n")
    sys.stdout.flush()


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, right: Sequence[str] = ()) -> None:
    """Print rows; columns named in `right` are aligned to the right."""
    console = out()
    if console.is_terminal:
        shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
        for column in columns:
            shown.add_column(column, justify="right" if column in right else "left", overflow="fold")
        for row in rows:
            shown.add_row(*(_text(cell) for cell in row))
        console.print(shown)
        return
    plain = [list(columns), *([_text(cell).plain.replace("\n", " ") for cell in row] for row in rows)]
    widths = [max(len(row[nth]) for row in plain) for nth in range(len(columns))]
    for row in plain:
        cells = (
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, cell, width in zip(columns, row, widths, strict=True)
        )
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


def _text(cell: Cell) -> Text:
    text, style = cell if isinstance(cell, tuple) else (cell, "")
    shown = printable_lines(text)
    shown.stylize(style)
    return shown
