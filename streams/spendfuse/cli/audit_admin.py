"""`spendfuse audit retention | rebuild | forget | subject-key | roles`: what an operator does, and says so."""

import os
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from spendfuse.cli import operator_entry
from spendfuse.cli.audit import audit
from spendfuse.cli.operator_entry import By, Reason
from spendfuse.cli.options import STATE_DIR, Json, Servers, StateDir, command

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spendfuse.audit.database import Database
    from spendfuse.cli.target import Target
    from spendfuse.settings import AuditSettings

SUBJECT_KEY_BYTES: Final = 32
KEY_FILE_BYTES_MAX: Final = 4_096


def register(_app: typer.Typer) -> None:
    """Add the commands to `spendfuse audit`."""
    command(
        audit, retention,
        "spendfuse audit retention",
        "spendfuse audit retention --apply --by ada --reason 'yearly'",
    )  # fmt: skip
    command(
        audit, rebuild,
        "spendfuse audit rebuild --check",
        "spendfuse audit rebuild --by ada --reason 'the disk was restored'",
    )  # fmt: skip
    command(audit, subject_key, "spendfuse audit subject-key --out subject.key --kid 2026", name="subject-key")
    command(audit, forget, "spendfuse audit forget subject.key --by ada --reason 'asked to, 2026-11-23'")
    command(
        audit, roles, "spendfuse audit roles | clickhouse-client --user admin", "spendfuse audit roles --role reader"
    )


def retention(
    apply: Annotated[bool, typer.Option("--apply/--plan", help="Drop what has expired, or only show it.")] = False,
    by: By = "",
    reason: Reason = "",
    bootstrap_servers: Servers = None,
    state_dir: StateDir = STATE_DIR,
    as_json: Json = False,
) -> None:
    """Drop months of usage that are older than SPENDFUSE_RETENTION_DAYS (at least 184), oldest first.

    The ledger first gets a signed entry of what goes: months, rows, money, and where they lay, so that `audit verify`
    says expired and not tampered. Sums, commands and headers stay. Stop the audit process for it; a server needs an
    account with the role spendfuse_operator.
    """
    from spendfuse.audit import retention as kept
    from spendfuse.cli import console, target

    where = target.find(bootstrap_servers, state_dir)
    settings = _settings(where)
    signer = operator_entry.who(where, by, reason) if apply else None
    now = datetime.now(UTC)
    with _as_operator(settings) as database:
        months = kept.plan(database, settings.retention_days, now)
        due = [month for month in months if month.expired]
        if apply and due:
            about = kept.about(database, due, settings.retention_days)
            operator_entry.record(where, kept.ACTION, about, by, reason, now, signer)
            kept.apply(database, due, settings.retention_days, now)
    states = [(month, "dropped" if apply else "has expired") if month.expired else (month, "kept") for month in months]
    if as_json:
        console.data([
            {"month": month.name, "rows": month.rows, "cost_nanos": month.cost_nanos, "state": state}
            for month, state in states
        ])  # fmt: skip
        return
    console.table(
        ["month", "rows", "newest row came", "state"],
        [
            [
                month.name,
                f"{month.rows:,}",
                f"{month.newest_at:%Y-%m-%d}",
                (state, "yellow" if month.expired else "dim"),
            ]
            for month, state in states
        ],
        right=["rows"],
    )
    if not due:
        console.note(f"nothing is older than {settings.retention_days} days")


def rebuild(
    check: Annotated[
        bool, typer.Option("--check", help="Only compare the rollups with their rows; exit 1 if any differs.")
    ] = False,
    by: By = "",
    reason: Reason = "",
    bootstrap_servers: Servers = None,
    state_dir: StateDir = STATE_DIR,
    as_json: Json = False,
) -> None:
    """Make the rollups anew from the rows they sum.

    The ledger first gets a signed entry of it: who, why, and which months differ. Stop the audit process for it, after
    it was ready once (its last batch is then whole); a server needs an account with the role spendfuse_operator.
    Months whose rows have expired keep their sums.
    """
    from spendfuse.audit import rebuild as anew
    from spendfuse.cli import console, target

    where = target.find(bootstrap_servers, state_dir)
    signer = None if check else operator_entry.who(where, by, reason)
    with _as_operator(_settings(where)) as database:
        found = anew.compare(database)
        if not check:
            differ = sorted({f"{each.table} {each.month}" for each in found})
            about = {"tables": list(anew.ROLLUPS), "differing": len(differ), "differ": operator_entry.some(differ)}
            operator_entry.record(where, "rebuild rollups", about, by, reason, datetime.now(UTC), signer)
            found = anew.rebuild(database, lambda table, month: console.note(f"{table} {month}"))
    if as_json:
        console.data([
            {
                "table": each.table, "month": each.month, "currency": each.currency,
                "rollup": dict(zip(("calls", "cost_nanos", "tokens"), each.rollup, strict=True)),
                "rows": dict(zip(("calls", "cost_nanos", "tokens"), each.rows, strict=True)),
            }
            for each in found
        ])  # fmt: skip
    elif found:
        console.table(
            ["rollup", "month", "currency", "calls", "of", "nano-units", "of"],
            [
                [each.table, each.month, each.currency]
                + [f"{of[place]:,}" for place in (0, 1) for of in (each.rollup, each.rows)]
                for each in found
            ],
        )
        console.note("they differed, and were made anew" if not check else "they differ: run `spendfuse audit rebuild`")
    else:
        console.line("every rollup is the sum of its rows")
    raise typer.Exit(1 if check and found else 0)


def subject_key(
    out: Annotated[Path, typer.Option(metavar="FILE", help="File for the key, readable by you alone.")],
    kid: Annotated[str, typer.Option(help="Id of the key, such as the year it is for.")],
) -> None:
    """Make a key that hashes person ids: emitters use it, ClickHouse never has it.

    One for each workspace and year; give its path to emitters as SPENDFUSE_SUBJECT_KEY_FILE.
    """
    import secrets

    from spendfuse.cli import console
    from spendfuse.cli.faults import EXIT_SETTINGS, CliError, usage_error
    from spendfuse.client.keys import format_keys

    try:
        text = format_keys({kid: secrets.token_bytes(SUBJECT_KEY_BYTES)})
    except ValueError as error:
        raise usage_error(str(error)) from error
    try:
        handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise CliError(f"{out} exists and is not overwritten: choose another --out", EXIT_SETTINGS) from error
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text + "\n")
    console.line(f"{out}  for emitters: export SPENDFUSE_SUBJECT_KEY_FILE={out}")


def forget(
    key_file: Annotated[Path, typer.Argument(metavar="FILE", help="File of the subject key.")],
    by: By,
    reason: Reason,
    bootstrap_servers: Servers = None,
    state_dir: StateDir = STATE_DIR,
) -> None:
    """Destroy a subject key: nobody can tell any more who the hashes made with it stand for.

    The ledger first gets a signed entry of it (the key's id, no key). No row changes, so the trail still verifies. It
    forgets everybody of that key; destroy its other copies too (emitters' secrets, backups).
    """
    from spendfuse.cli import console, target
    from spendfuse.cli.faults import EXIT_SETTINGS, CliError
    from spendfuse.client.subject import Subjects

    where = target.find(bootstrap_servers, state_dir)
    signer = operator_entry.who(where, by, reason)
    with key_file.open(encoding="utf-8") as file:
        text = file.read(KEY_FILE_BYTES_MAX)
    try:
        kid = Subjects.parse(text).kid
    except ValueError as error:
        raise CliError(f"{key_file} is no subject key: {error}", EXIT_SETTINGS) from error
    operator_entry.record(where, "forget", {"kid": kid}, by, reason, datetime.now(UTC), signer)
    with key_file.open("r+b") as raw:
        length = raw.seek(0, os.SEEK_END)
        raw.seek(0)
        raw.write(bytes(length))
        raw.flush()
        os.fsync(raw.fileno())
    key_file.unlink()
    console.line(f"key {kid} is destroyed: {key_file} is gone")
    console.note("destroy its other copies as well: emitters' secrets, backups")


def roles(
    role: Annotated[str | None, typer.Option(metavar="NAME", help="Only this: migrator, writer, reader, ...")] = None,
) -> None:
    """Print the SQL that makes the trail's roles on a ClickHouse server: append-only by rights."""
    import sys

    from spendfuse.audit.database import database_name
    from spendfuse.audit.roles import ROLES, statements
    from spendfuse.settings import AuditSettings

    database = database_name(AuditSettings.from_env())
    for each in ROLES if role is None else (role,):
        sys.stdout.write("".join(f"{statement};\n" for statement in statements(each, database)))


def _settings(where: "Target") -> "AuditSettings":
    from spendfuse.settings import AuditSettings

    settings = AuditSettings.from_env(where.env)
    if where.up is not None and where.up.clickhouse_directory and not settings.clickhouse_url:
        return settings.model_copy(update={"chdb_dir": where.up.clickhouse_directory})
    return settings


@contextmanager
def _as_operator(settings: "AuditSettings") -> "Iterator[Database]":
    """Open the trail with an operator's rights: the embedded one for this process alone, or as a server's account."""
    from spendfuse.audit.database import Engine, open_embedded, open_server

    if settings.clickhouse_url:
        database = open_server(settings)
    else:
        database = open_embedded(Engine(Path(settings.chdb_dir), settings.database, "operator"))
    try:
        yield database
    finally:
        database.close()
