"""`spendfuse state`: the worker's tables, written anew when they or Kafka were lost."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spendfuse.cli.operator_entry import Reason, Whoever
from spendfuse.cli.options import STATE_DIR, Json, Servers, StateDir, command, examples

if TYPE_CHECKING:
    from spendfuse.cli.target import Target
    from spendfuse.pipeline.rebuild import Prepared
    from spendfuse.pipeline.rebuild_write import Written
    from spendfuse.settings import WorkerSettings

state = typer.Typer(
    help="The worker's tables: what they are rebuilt from.",
    no_args_is_help=True,
    epilog=examples("spendfuse state rebuild --plan", "spendfuse state rebuild --from clickhouse"),
)


class Source(StrEnum):
    """What a rebuild reads."""

    LEDGER = "ledger"
    CLICKHOUSE = "clickhouse"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(
        state, rebuild,
        "spendfuse state rebuild --plan",
        "spendfuse state rebuild",
        "spendfuse state rebuild --from clickhouse   (Kafka was lost, and its topics are new)",
    )  # fmt: skip
    app.add_typer(state, name="state")


def rebuild(
    source: Annotated[
        Source,
        typer.Option(
            "--from",
            help="ledger: the changelogs are lost or unreadable; clickhouse: Kafka is lost and new topics exist.",
        ),
    ] = Source.LEDGER,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what would be written.")] = False,
    stopped: Annotated[
        bool, typer.Option("--stopped", help="Every worker is stopped, whatever the broker says of its groups.")
    ] = False,
    by: Whoever = "",
    reason: Reason = "",
    bootstrap_servers: Servers = None,
    state_dir: StateDir = STATE_DIR,
    as_json: Json = False,
) -> None:
    """Write the worker's tables anew: sums, watermarks, remembered ids, fuses.

    Stop every worker for it, and give it their settings (SPENDFUSE_PARTITIONS, keys, app id). It may be run again, also
    after it was killed in the middle: until it has ended no worker starts. Calls in flight are not rebuilt. The ledger
    gets an entry of it first.
    """
    from spendfuse.cli import console, kafka, operator_entry, target
    from spendfuse.pipeline import rebuild_write
    from spendfuse.settings import WorkerSettings

    where = target.find(bootstrap_servers, state_dir)
    settings = WorkerSettings.from_env(where.env)
    by = operator_entry.named(by, reason)

    async def work(progress: Callable[[str, int, int], None]) -> "tuple[Prepared, Written | None]":
        async with kafka.reaching(where):
            if not plan:
                await rebuild_write.refuse_workers(where.broker, settings, stopped=stopped)
                # Before the ledger is read: one that grows afterwards is refused.
                about = {"from": str(source), "app_id": settings.app_id}
                await operator_entry.send_as(where, "rebuild state", about, by, reason)
            prepared = await _prepare(where, settings, source, progress)
            if plan:
                return prepared, None
            return prepared, await rebuild_write.write(where.broker, settings, prepared, progress, stopped=stopped)

    with _progress() as progress:
        prepared, written = kafka.run(work(progress))
    found = _report(prepared, written)
    if as_json:
        console.data(found)
        return
    console.table(
        ["table", "records"], [[name, f"{count:,}"] for name, count in found["records"].items()], right=["records"]
    )
    if prepared.unreadable:
        console.note(f"{prepared.unreadable:,} messages of the ledger cannot be read and count nothing", "yellow")
    console.line(
        f"{prepared.rebuilt.tally.charges:,} charges from {found['first']} to {found['last']}, "
        f"{prepared.rebuilt.tally.commands:,} commands"
    )
    console.note("nothing was written (--plan)" if written is None else "the tables are written: start the workers")


async def _prepare(
    where: "Target", settings: "WorkerSettings", source: Source, progress: Callable[[str, int, int], None]
) -> "Prepared":
    from spendfuse.cli import trail
    from spendfuse.pipeline import rebuild as anew

    if source is Source.LEDGER:
        return await anew.prepare_from_ledger(where.broker, settings, where.clock, progress)
    with trail.asking(where) as client:
        return await anew.prepare_from_trail(where.broker, settings, where.clock, client, progress)


def _report(prepared: "Prepared", written: "Written | None") -> dict[str, Any]:
    """Return what was found, and what of it was (or would be) written."""
    from spendfuse.wire.base import from_us, rfc3339

    rebuilt, tally = prepared.rebuilt, prepared.rebuilt.tally
    slots = sum(len(seen.slots) for seen in rebuilt.seen.values())
    records = {"scopes": len(rebuilt.scopes), "ids": slots, "shared": len(rebuilt.shared)}
    if written is not None:
        records = {**written.rows, "old keys removed": written.stale}
    for name, given in (("budgets", prepared.budgets), ("prices", prepared.prices), ("commands", prepared.commands)):
        if given:
            records[f"{name} written back"] = len(given)
    return {
        "from": prepared.source,
        "written": written is not None,
        "charges": tally.charges,
        "repeated": tally.repeated,
        "commands": tally.commands,
        "ids": sum(len(seen.origins) for seen in rebuilt.seen.values()),
        "unreadable": prepared.unreadable,
        "first": rfc3339(from_us(tally.first_at_us)),
        "last": rfc3339(from_us(tally.last_at_us)),
        "records": records,
    }


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Give what shows progress on standard error: a bar on a terminal, else a line for each part that is done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from spendfuse.cli import console

    err = console.err()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, Any] = {}
    said: set[str] = set()
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:

        def show(what: str, done: int, total: int) -> None:
            if err.is_terminal:
                if what not in tasks:
                    tasks[what] = bars.add_task(what)
                bars.update(tasks[what], completed=done, total=total)
            elif done >= total and what not in said:
                said.add(what)
                console.note(f"{what}: {total:,}")

        yield show
