"""`spendfuse up`: everything on this machine, without Docker."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from spendfuse.cli.options import STATE_DIR, Json, StateDir, command

if TYPE_CHECKING:
    from spendfuse.cli.state_dir import UpState
    from spendfuse.embedded.stack import EmbeddedStack

WATCH_INTERVAL_S: Final = 0.5
SHOWN: Final = (
    "SPENDFUSE_BOOTSTRAP_SERVERS",
    "SPENDFUSE_PUBLIC_KEYS",
    "SPENDFUSE_FETCH_MAX_WAIT_MS",
    "SPENDFUSE_PRODUCER_MAX_BATCH_SIZE",
)
"""What an agent needs; the rest of the timings matter to consumer groups only."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(
        app,
        up,
        "spendfuse up",
        "spendfuse up --budgets budgets.yaml --partitions 8",
        "set -a; . .spendfuse/agent.env; set +a   (an agent's settings, in another terminal)",
    )


def up(
    partitions: Annotated[int, typer.Option(min=1, max=64, help="Partitions of usage, packed, rollup and ledger.")] = 4,
    workers: Annotated[int, typer.Option(min=1, max=16, help="Workers.")] = 1,
    budgets: Annotated[Path | None, typer.Option(metavar="FILE", help="A budget file to apply at once.")] = None,
    audit: Annotated[bool, typer.Option("--audit/--no-audit", help="Keep the trail in an embedded ClickHouse.")] = True,
    state_dir: StateDir = STATE_DIR,
    as_json: Json = False,
) -> None:
    """Run broker, worker and audit on this machine until Ctrl-C: for trying it out and developing, not for production.

    The broker holds all in memory: usage and budgets are gone when it ends. Keys for development are made in the state
    directory, where other spendfuse commands find the running stack by themselves.
    """
    import contextlib

    from spendfuse.adapters.budget_file import parse
    from spendfuse.cli import budgets as budget_commands
    from spendfuse.cli import console
    from spendfuse.cli.faults import EXIT_SETTINGS, CliError
    from spendfuse.cli.state_dir import AlreadyUpError, held
    from spendfuse.embedded.stack import EmbeddedStack

    text = None if budgets is None else budget_commands.read_text(budgets)
    if text is not None:
        parse(text, name=str(budgets))  # its faults before anything starts
    stack = EmbeddedStack(state_dir, partitions=partitions, workers=workers, audit=audit)
    with contextlib.ExitStack() as held_open:
        try:
            held_open.enter_context(held(state_dir))
        except AlreadyUpError as error:
            raise CliError(str(error), EXIT_SETTINGS) from error
        held_open.enter_context(_signals_as_interrupts())
        held_open.callback(_stop, stack)
        with contextlib.suppress(KeyboardInterrupt):
            with console.err().status("starting broker, worker and audit"):
                stack.start()
            state = describe(stack)
            state.write(state_dir)
            if text is not None:
                _apply(state_dir, text, str(budgets))
            _say(state, state_dir, as_json=as_json)
            _watch(stack)
        console.note("stopping")


def describe(stack: "EmbeddedStack") -> "UpState":
    """Return what a started stack says of itself."""
    import os

    from spendfuse.cli.state_dir import UpState
    from spendfuse.embedded.stack import TRAIL_DIRECTORY

    clickhouse = stack.clickhouse
    return UpState(
        pid=os.getpid(),
        partitions=stack.partitions,
        env=stack.env,
        signing_key_file=str(stack.signing_key_file),
        public_key_file=str(stack.public_key_file),
        run_directory=str(stack.run_directory),
        clickhouse_url=clickhouse.url if clickhouse else None,
        clickhouse_directory=str(stack.run_directory / TRAIL_DIRECTORY) if clickhouse else None,
    )


def _apply(state_dir: Path, text: str, name: str) -> None:
    from spendfuse.cli import budgets as budget_commands
    from spendfuse.cli import kafka, target

    # Its own broker, whatever the environment names.
    where = target.find(None, state_dir, ours=True)
    kafka.run(budget_commands.apply_text(where, text, name))


def _say(state: "UpState", state_dir: Path, *, as_json: bool) -> None:
    from spendfuse.cli import console
    from spendfuse.cli.state_dir import AGENT_ENV_FILE

    if as_json:
        console.data(state.model_dump(mode="json"))
        return
    console.line(f"spendfuse is up (pid {state.pid}). An agent on this machine needs:", "bold green")
    for name in SHOWN:
        console.line(f"export {name}={state.env[name]}")
    console.note(f"the same is in {state_dir / AGENT_ENV_FILE}; logs and trail are in {state.run_directory}")
    if state.clickhouse_url:
        console.note(f"ClickHouse answers at {state.clickhouse_url} (user reader; its token is beside the trail)")
    console.note("next: spendfuse status, spendfuse budgets apply FILE, spendfuse usage emit; Ctrl-C ends it all")


def _watch(stack: "EmbeddedStack") -> None:
    """Wait until interrupted; raises CliError when a part ends by itself."""
    import time

    from spendfuse.cli.faults import EXIT_UNAVAILABLE, CliError

    while (failed := stack.failed()) is None:
        time.sleep(WATCH_INTERVAL_S)
    raise CliError(
        f"{failed} has ended, so everything is stopped; why is at the end of {stack.run_directory / failed}.log",
        EXIT_UNAVAILABLE,
    )


def _stop(stack: "EmbeddedStack") -> None:
    """Stop the stack; further interrupts must not leave half of it running (each part has its own deadline)."""
    import signal

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    stack.stop()


def _signals_as_interrupts() -> Any:
    """Take SIGTERM and SIGHUP (a closed terminal) as Ctrl-C while it runs."""
    import contextlib
    import signal
    from collections.abc import Iterator

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    @contextlib.contextmanager
    def taken() -> Iterator[None]:
        before = {number: signal.signal(number, interrupt) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    return taken()
