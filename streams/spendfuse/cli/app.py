"""The command tree. Modules here import typer and nothing heavy: `--help` must answer at once."""

from typing import Annotated, Final

import typer

from spendfuse import __version__
from spendfuse.cli import (
    audit,
    audit_admin,
    budgets,
    control,
    demo,
    dlq,
    doctor,
    guard,
    incidents,
    keys,
    report,
    state,
    status,
    topics,
    up,
    usage,
    worker,
)
from spendfuse.cli.faults import Commands
from spendfuse.cli.options import examples

EXIT_CODES: Final = (
    "Exit codes: 0 ok, 1 a check failed, 2 wrong usage, 64 settings or a file at fault, "
    "65 state and topics that do not fit, "
    "69 broker or database away, 70 a fault of spendfuse, 130 interrupted."
)

app: Final = typer.Typer(
    name="spendfuse",
    cls=Commands,
    help="A fuse for AI-agent spend: usage in on Kafka, signed kill-switch commands out.",
    epilog=f"{EXIT_CODES}\n\n{examples('spendfuse demo', 'spendfuse up', 'spendfuse status')}",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"spendfuse {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


demo.register(app)
up.register(app)
worker.register(app)
topics.register(app)
budgets.register(app)
status.register(app)
usage.register(app)
dlq.register(app)
control.register(app)
incidents.register(app)
guard.register(app)
keys.register(app)
audit.register(app)
audit_admin.register(app)
report.register(app)
state.register(app)
doctor.register(app)
