"""`spendfuse budgets`: check a file, apply it, list what is in force."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple

import typer

from spendfuse.cli.operator_entry import Reason, Whoever
from spendfuse.cli.options import STATE_DIR, Json, Servers, StateDir, command, examples

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from spendfuse.adapters.budget_file import BudgetFile
    from spendfuse.cli.target import Target
    from spendfuse.client.follow import Record
    from spendfuse.wire.budget import Budget, WorkspaceSettings

FILE_BYTES_MAX: Final = 4_194_304
RECORDS_MAX: Final = 100_000
STYLES: Final = {"new": "green", "changed": "yellow", "withdrawn": "red", "unchanged": "dim", "not in the file": "dim"}

budgets = typer.Typer(
    help="Budgets: who may spend how much.",
    no_args_is_help=True,
    epilog=examples("spendfuse budgets check budgets.yaml", "spendfuse budgets apply budgets.yaml"),
)
BudgetPath = Annotated[Path, typer.Argument(metavar="FILE", help="A budget file (YAML); - reads standard input.")]
Currency = Annotated[str, typer.Option(metavar="CODE", help="Currency of the price book.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(budgets, check, "spendfuse budgets check budgets.yaml", "spendfuse budgets check - < budgets.yaml")
    command(
        budgets,
        apply,
        "spendfuse budgets apply budgets.yaml --dry-run",
        "spendfuse budgets apply budgets.yaml",
        "spendfuse budgets apply budgets.yaml --prune   (withdraws budgets that the file does not name)",
    )
    command(budgets, list_, "spendfuse budgets list", "spendfuse budgets list --json", name="list")
    app.add_typer(budgets, name="budgets")


class Change(NamedTuple):
    """One line of the difference between a file and what is in force."""

    state: Literal["new", "changed", "unchanged", "withdrawn", "not in the file"]
    key: str
    what: str


@dataclass(slots=True)
class InForce:
    """The latest record of each key of `budgets.v1`, and how many could not be read."""

    budgets: "dict[str, Budget]" = field(default_factory=dict)
    workspaces: "dict[str, WorkspaceSettings]" = field(default_factory=dict)
    unreadable: int = 0

    def on_record(self, record: "Record") -> None:
        """Take in one record, as the worker does."""
        from spendfuse.pipeline.feed import WORKSPACE_KEY, decode_budget
        from spendfuse.wire.budget import Budget

        key = (record.key or b"").decode("utf-8", "replace")
        if record.value is None:
            self.budgets.pop(key, None)
            if key.startswith(WORKSPACE_KEY):
                self.workspaces.pop(key.removeprefix(WORKSPACE_KEY), None)
            return
        try:
            said = decode_budget(record.key, record.value)
        except ValueError:
            self.unreadable += 1
            return
        if isinstance(said, Budget):
            if said.id in self.budgets or len(self.budgets) < RECORDS_MAX:
                self.budgets[said.id] = said
        elif said.workspace in self.workspaces or len(self.workspaces) < RECORDS_MAX:
            self.workspaces[said.workspace] = said

    @property
    def zones(self) -> dict[str, str]:
        """Return the time zone of each workspace."""
        return {name: settings.timezone for name, settings in self.workspaces.items()}


def check(file: BudgetPath, currency: Currency = "USD", as_json: Json = False) -> None:
    """Say everything that is wrong with a budget file, with line numbers; exit 64 if anything is.

    It needs no broker, so it suits a pre-commit hook.
    """
    from spendfuse.adapters.budget_file import BudgetFileError, dump, parse
    from spendfuse.cli import console
    from spendfuse.cli.faults import EXIT_SETTINGS

    try:
        found = parse(read_text(file), name=str(file), currency=currency)
    except BudgetFileError as error:
        if not as_json:
            raise
        console.data({"ok": False, "faults": [fault._asdict() for fault in error.faults]})
        raise typer.Exit(EXIT_SETTINGS) from None
    if as_json:
        console.data({"ok": True, "notes": [note._asdict() for note in found.notes], **_counts(found)})
        return
    for budget in found.budgets:
        console.line(dump(budget))
    _print_notes(found, file)
    console.line(f"{file}: {len(found.budgets)} budgets, {len(found.workspaces)} workspaces, no mistakes", "green")


def apply(
    file: BudgetPath,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would change.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Withdraw the budgets in force that the file lacks.")] = False,
    currency: Currency = "USD",
    by: Whoever = "",
    reason: Reason = "",
    bootstrap_servers: Servers = None,
    state_dir: StateDir = STATE_DIR,
    as_json: Json = False,
) -> None:
    """Put the budgets of a file in force: what is new or changed is published, the rest is left alone.

    The worker acts at once: a raised cap lets a halted agent go on, a lowered one may stop it.
    """
    from spendfuse.cli import console, kafka, operator_entry, target

    by = operator_entry.named(by, reason)
    where = target.find(bootstrap_servers, state_dir)
    text = read_text(file)

    async def say(changes: "Sequence[Change]") -> None:
        about = {
            "changes": len(changes),
            "budgets": operator_entry.some([{"state": each.state, "key": each.key} for each in changes]),
        }
        await operator_entry.send_as(where, "apply budgets", about, by, reason)

    found, changes = kafka.run(
        apply_text(where, text, str(file), currency=currency, prune=prune, dry_run=dry_run, say=say)
    )
    if as_json:
        console.data({"dry_run": dry_run, "changes": [change._asdict() for change in changes]})
        return
    console.table(
        ["", "budget", "what"], [[(change.state, STYLES[change.state]), change.key, change.what] for change in changes]
    )
    _print_notes(found, file)
    done = sum(change.state in ("new", "changed", "withdrawn") for change in changes)
    console.note(f"{done} {'would be' if dry_run else ''} published".replace("  ", " ") + f" to {where.servers}")


def list_(bootstrap_servers: Servers = None, state_dir: StateDir = STATE_DIR, as_json: Json = False) -> None:
    """List the budgets in force."""
    from spendfuse.adapters.budget_file import dump
    from spendfuse.cli import console, kafka, target

    where = target.find(bootstrap_servers, state_dir)
    in_force = kafka.run(read_in_force(where))
    found = [in_force.budgets[key] for key in sorted(in_force.budgets)]
    if as_json:
        console.data(
            {
                "budgets": [budget.model_dump(mode="json", exclude_none=True) for budget in found],
                "workspaces": [
                    in_force.workspaces[name].model_dump(mode="json") for name in sorted(in_force.workspaces)
                ],
                "unreadable": in_force.unreadable,
            }
        )
        return
    if not found:
        console.note("no budget is in force: apply some with `spendfuse budgets apply FILE`")
    for budget in found:
        console.line(dump(budget))
    if in_force.unreadable:
        console.note(f"{in_force.unreadable} records of the topic cannot be read, and are not in force", "yellow")


async def apply_text(
    where: "Target",
    text: str,
    name: str,
    *,
    currency: str = "USD",
    prune: bool = False,
    dry_run: bool = False,
    say: "Callable[[Sequence[Change]], Awaitable[None]] | None" = None,
) -> "tuple[BudgetFile, list[Change]]":
    """Publish what a budget file changes; return the file and its difference to what was in force.

    `say` is given what will be published before it is. Raises BudgetFileError, BrokerAwayError, or CliError when the
    topics do not exist.
    """
    from spendfuse.adapters.budget_file import parse, with_versions
    from spendfuse.cli import kafka
    from spendfuse.wire.base import encode, from_us
    from spendfuse.wire.cloudevents import headers
    from spendfuse.wire.topics import BUDGETS

    parse(text, name=name, currency=currency)  # a file at fault is said before the broker is asked
    in_force = await read_in_force(where)
    found = parse(text, name=name, currency=currency, zones=in_force.zones)
    now = from_us(where.clock())
    wanted = with_versions(
        [budget.model_copy(update={"applied_at": now}) for budget in found.budgets], in_force.budgets
    )
    changes, records = difference(wanted, found.workspaces, in_force, prune=prune)
    if not dry_run and records:
        if say is not None:
            await say([change for change in changes if change.state in ("new", "changed", "withdrawn")])
        async with kafka.sending(where) as send:
            for key, record in records:
                kind = "budget.v1" if record is not None else "budget.withdrawn.v1"
                value = encode(record) if record is not None else None
                await send(BUDGETS.name, value, key.encode(), headers(kind, "//spendfuse/cli", key, now))
    return found, changes


async def read_in_force(where: "Target") -> InForce:
    """Return what `budgets.v1` holds now."""
    from spendfuse.cli import kafka
    from spendfuse.wire.topics import BUDGETS

    in_force = InForce()
    await kafka.check_topics(where, BUDGETS.name)
    await kafka.read_to_end(where, {BUDGETS.name: in_force.on_record})
    return in_force


def difference(
    wanted: "Sequence[Budget]", workspaces: "Sequence[WorkspaceSettings]", in_force: InForce, *, prune: bool
) -> "tuple[list[Change], list[tuple[str, Budget | WorkspaceSettings | None]]]":
    """Return what differs, and the records to publish for it (None withdraws). Versions are those to be published."""
    from spendfuse.adapters.budget_file import dump
    from spendfuse.pipeline.feed import budget_key

    changes: list[Change] = []
    records: list[tuple[str, Budget | WorkspaceSettings | None]] = []
    for settings in workspaces:  # first: budgets without a zone of their own take it
        known_zone = in_force.workspaces.get(settings.workspace)
        if known_zone == settings:
            changes.append(Change("unchanged", budget_key(settings), settings.timezone))
            continue
        what = settings.timezone if known_zone is None else f"{known_zone.timezone} -> {settings.timezone}"
        changes.append(Change("changed" if known_zone else "new", budget_key(settings), what))
        records.append((budget_key(settings), settings))
    for budget in wanted:
        known = in_force.budgets.get(budget.id)
        if known is not None and known.version == budget.version:
            changes.append(Change("unchanged", budget.id, dump(budget)))
            continue
        what = dump(budget) if known is None else f"{dump(budget)}  [{_fields(known, budget)}]"
        changes.append(Change("changed" if known else "new", budget.id, what))
        records.append((budget.id, budget))
    named = {budget.id for budget in wanted}
    for key in sorted(set(in_force.budgets) - named):
        changes.append(Change("withdrawn" if prune else "not in the file", key, dump(in_force.budgets[key])))
        if prune:
            records.append((key, None))
    return changes, records


def _fields(known: "Budget", budget: "Budget") -> str:
    before: Mapping[str, Any] = known.model_dump(exclude={"version", "applied_at"})
    after: Mapping[str, Any] = budget.model_dump(exclude={"version", "applied_at"})
    return ", ".join(name for name in after if before[name] != after[name])


def read_text(file: Path) -> str:
    """Return the text of a file, or of standard input for `-`; raises CliError."""
    import sys

    from spendfuse.cli.faults import EXIT_SETTINGS, CliError

    try:
        if str(file) == "-":
            raw = sys.stdin.buffer.read(FILE_BYTES_MAX + 1)
        else:
            with file.open("rb") as opened:
                raw = opened.read(FILE_BYTES_MAX + 1)
        if len(raw) > FILE_BYTES_MAX:
            raise CliError(f"{file} is larger than {FILE_BYTES_MAX:,} bytes: not a budget file", EXIT_SETTINGS)
        return raw.decode()
    except UnicodeDecodeError as error:
        raise CliError(f"{file} is not UTF-8 (byte {error.start}): save it as UTF-8", EXIT_SETTINGS) from error
    except OSError as error:
        raise CliError(f"{file} cannot be read: {error.strerror or error}", EXIT_SETTINGS) from error


def _print_notes(found: "BudgetFile", file: Path) -> None:
    from spendfuse.cli import console

    for note in found.notes:
        console.note(f"note {file}:{note}", "yellow")


def _counts(found: "BudgetFile") -> dict[str, int]:
    return {"budgets": len(found.budgets), "workspaces": len(found.workspaces)}
