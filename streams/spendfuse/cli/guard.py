"""`spendfuse guard`: the stop for programs that know nothing of spendfuse."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from spendfuse.cli.guard_check import MIRROR_DEFAULT, MIRROR_ENV
from spendfuse.cli.options import STATE_DIR, Servers, StateDir, command, examples

if TYPE_CHECKING:
    from spendfuse.cli.target import Target

GRACE_S_DEFAULT: Final = 10.0

guard = typer.Typer(
    help="Stop programs that know nothing of spendfuse: run them under a guard, or ask a file before each step.",
    no_args_is_help=True,
    epilog=examples("spendfuse guard exec -- python agent.py", "spendfuse guard check agent:acme/research/planner-7"),
)
MirrorFile = Annotated[
    Path, typer.Option("--mirror", envvar=MIRROR_ENV, metavar="FILE", help="The file that `guard mirror` keeps.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    guard.command(
        "exec",
        help="\n\n".join(" ".join(part.split()) for part in (exec_.__doc__ or "").split("\n\n")),
        epilog=examples(
            "spendfuse guard exec -- python agent.py",
            "spendfuse guard exec --agent planner-7 --grace 30 -- ./run.sh --fast",
        ),
        context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    )(exec_)
    command(
        guard,
        check,
        "spendfuse guard check agent:acme/research/planner-7 && ./next-step.sh",
        "spendfuse guard check team:acme/research --run run-42 --quiet",
    )
    command(guard, mirror, "spendfuse guard mirror", "spendfuse guard mirror --mirror /run/spendfuse/mirror.json")
    app.add_typer(guard, name="guard")


def exec_(
    program: Annotated[list[str], typer.Argument(metavar="-- COMMAND", help="The program and its arguments.")],
    grace: Annotated[
        float, typer.Option(min=0.0, max=3_600.0, metavar="SECONDS", help="From SIGTERM to SIGKILL.")
    ] = GRACE_S_DEFAULT,
    workspace: Annotated[str | None, typer.Option(help="Else SPENDFUSE_WORKSPACE.")] = None,
    team: Annotated[str | None, typer.Option(help="Else SPENDFUSE_TEAM.")] = None,
    agent: Annotated[str | None, typer.Option(help="Else SPENDFUSE_AGENT.")] = None,
    run: Annotated[str | None, typer.Option(help="Else SPENDFUSE_RUN, else a new one; the program is told.")] = None,
    bootstrap_servers: Servers = None,
    state_dir: StateDir = STATE_DIR,
) -> None:
    """Run any program, and end it with its whole process group when its scope halts.

    The group gets SIGTERM, and after --grace SIGKILL; then the halt is acknowledged as enforced. Signals go on to the
    group. Exit code: the program's own (128 + the signal that ended it), 75 when a halt ended it or kept it from
    starting, 126 or 127 when it cannot be started. What leaves its process group is beyond it.
    """
    from spendfuse.cli import target
    from spendfuse.cli.faults import say
    from spendfuse.cli.supervise import EXIT_HALTED, supervise
    from spendfuse.client import Guard, Halted
    from spendfuse.settings import GuardSettings, IdentitySettings

    where = target.find(bootstrap_servers, state_dir)
    names = IdentitySettings.from_env(where.env, workspace=workspace, team=team, agent=agent, run=run)
    keeper = Guard(names, where.broker, GuardSettings.from_env(where.env), where.clock)
    identity = keeper.identity
    env = dict(os.environ) | {
        "SPENDFUSE_WORKSPACE": identity.workspace,
        "SPENDFUSE_TEAM": identity.team,
        "SPENDFUSE_AGENT": identity.agent,
        "SPENDFUSE_RUN": identity.run,  # what it emits and what halts it are of one run
    }
    with keeper:
        try:
            keeper.check()
        except Halted as halted:
            say(f"{halted}; it was not started")
            raise typer.Exit(EXIT_HALTED) from None
        code = supervise(keeper, program, grace, env, say)
    raise typer.Exit(code)


def check(
    scope: Annotated[str, typer.Argument(metavar="SCOPE", help="agent:WORKSPACE/TEAM/AGENT, or any other scope.")],
    run: Annotated[str | None, typer.Option(help="Root run of the agent; else SPENDFUSE_ROOT_RUN or _RUN.")] = None,
    mirror: MirrorFile = Path(MIRROR_DEFAULT),
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing, answer by exit code alone.")] = False,
) -> None:
    """Say by exit code whether a scope may go on, from the file that `spendfuse guard mirror` keeps.

    It asks nobody, and loads nothing but the standard library: for hooks and scripts, before every step. Exit code:
    0 go on, 1 halted (itself or a scope above it), 69 nothing to be relied on (no file, or too old to trust).
    """
    from spendfuse.cli import guard_check

    arguments = [scope, "--mirror", str(mirror), *(["--run", run] if run else []), *(["--quiet"] if quiet else [])]
    raise typer.Exit(guard_check.main(arguments))


def mirror(
    mirror: MirrorFile = Path(MIRROR_DEFAULT), bootstrap_servers: Servers = None, state_dir: StateDir = STATE_DIR
) -> None:
    """Keep a file that says which scopes are halted, until Ctrl-C: what `guard check` and hooks read.

    One for each machine. It follows every command, verifies it, and replaces the file at once when something changes
    and every second (0600). When it dies, or hears no worker any more, the file says from when it must not be trusted.
    """
    import asyncio

    from spendfuse.cli import console, target
    from spendfuse.client.mirror import Mirror

    where = target.find(bootstrap_servers, state_dir)
    path = mirror.expanduser()
    keeper = Mirror(path, where.broker, _settings(where), _verifier(where), where.clock)
    _run(asyncio, keeper, lambda: console.note(f"{path} says what is halted at {where.servers}"))


def _run(asyncio: Any, keeper: Any, on_ready: Any) -> None:
    """Keep the file until SIGINT or SIGTERM; both end it in good order."""
    import signal

    async def keep() -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(keeper.run(on_ready))
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            return

    asyncio.run(keep())
    sys.stderr.flush()


def _settings(where: "Target") -> Any:
    from spendfuse.settings import GuardSettings

    return GuardSettings.from_env(where.env)


def _verifier(where: "Target") -> Any:
    from spendfuse.cli.faults import EXIT_SETTINGS, CliError

    verifier = where.verifier()
    if verifier is None and not where.operator.unsigned_commands:
        raise CliError(
            "there are no public keys to check commands with: set SPENDFUSE_PUBLIC_KEYS or SPENDFUSE_PUBLIC_KEYS_FILE",
            EXIT_SETTINGS,
        )
    return verifier
