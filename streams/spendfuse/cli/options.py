"""Options that several commands share, and small values that are read from the command line."""

import inspect
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Final

import typer

from spendfuse.cli.faults import usage_error

STATE_DIR: Final = Path(".spendfuse")
_DURATION: Final = re.compile(r"([0-9]{1,6})\s*([smhdw])")
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}

Servers = Annotated[
    str | None,
    typer.Option(
        "--bootstrap-servers",
        "-b",
        metavar="HOST:PORT",
        help="Kafka to use; else SPENDFUSE_BOOTSTRAP_SERVERS, else a running `spendfuse up`.",
    ),
]
StateDir = Annotated[
    Path,
    typer.Option(
        "--state-dir",
        envvar="SPENDFUSE_STATE_DIR",
        metavar="DIR",
        help="Where `spendfuse up` keeps its state, and says that it runs.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program.")]


def command(app: typer.Typer, function: Callable[..., None], *lines: str, name: str | None = None) -> None:
    """Add a function to an app as a command, with its docstring as help and some examples."""
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    app.command(name, help=text, epilog=examples(*lines))(function)


def examples(*lines: str) -> str:
    """Return an epilog of examples, a line each (typer joins lines that no blank line parts)."""
    return "\n\n".join(["Examples:", *lines])


def duration(text: str) -> timedelta:
    """Return the length of `90s`, `30m`, `2h`, `1d` or `1w`; raises a usage error."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or not int(match[1]):
        raise usage_error(f"{text[:40]!r} is no length of time: write such as 90s, 30m, 2h or 1d")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})
