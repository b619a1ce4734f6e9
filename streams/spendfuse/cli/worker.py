"""`spendfuse worker`: one worker in this process."""

from typing import Annotated

import typer

from spendfuse.cli.options import STATE_DIR, Servers, StateDir, command


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(
        app,
        worker,
        "SPENDFUSE_SIGNING_KEY_FILE=keys/signing.key spendfuse worker -b kafka-1:9092",
        "SPENDFUSE_UNSIGNED_COMMANDS=true spendfuse worker   (development only)",
    )


def worker(
    bootstrap_servers: Servers = None,
    state_dir: StateDir = STATE_DIR,
    partitions: Annotated[
        int | None, typer.Option(min=1, max=1_000, help="Partitions of the deployment; fixed at birth.")
    ] = None,
    data_dir: Annotated[str | None, typer.Option(metavar="DIR", help="The worker's own files.")] = None,
) -> None:
    """Run a worker until it is told to stop (Ctrl-C, SIGTERM): it meters, decides and commands.

    Start as many as you like: Kafka shares the partitions out. All other settings come from SPENDFUSE_... variables.
    """
    from spendfuse.cli import target
    from spendfuse.pipeline.worker import run
    from spendfuse.settings import ClockSettings, WorkerSettings

    where = target.find(bootstrap_servers, state_dir)
    settings = WorkerSettings.from_env(where.env, partitions=partitions, data_dir=data_dir)
    raise typer.Exit(run(where.broker, settings, ClockSettings.from_env(where.env)))
