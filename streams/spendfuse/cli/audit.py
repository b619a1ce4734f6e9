"""`spendfuse audit`: the trail in ClickHouse."""

import os
from typing import Annotated

import typer

from spendfuse.cli import audit_proof
from spendfuse.cli.operator_entry import Reason, Whoever
from spendfuse.cli.options import STATE_DIR, Json, Servers, StateDir, command, examples

audit = typer.Typer(
    help="The trail in ClickHouse.",
    no_args_is_help=True,
    epilog=examples("spendfuse audit migrate", "spendfuse audit run", "spendfuse audit verify"),
)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(
        audit,
        migrate,
        "SPENDFUSE_CLICKHOUSE_URL=https://audit@ch.example:8443/spendfuse spendfuse audit migrate",
        "spendfuse audit migrate --plan",
    )
    command(
        audit,
        run,
        "spendfuse audit run",
        "SPENDFUSE_CLICKHOUSE_URL=http://audit@127.0.0.1:8123/spendfuse spendfuse audit run",
    )
    audit_proof.register(audit)
    app.add_typer(audit, name="audit")


def migrate(
    check: Annotated[
        bool, typer.Option("--check", "--plan", help="Only say what is still to be run; exit 1 if anything is.")
    ] = False,
    by: Whoever = "",
    reason: Reason = "",
    bootstrap_servers: Servers = None,
    state_dir: StateDir = STATE_DIR,
    as_json: Json = False,
) -> None:
    """Bring the database of SPENDFUSE_CLICKHOUSE_URL (or the embedded one) up to date. Run again, it does nothing.

    A database that is not new gets an entry in the ledger of it, where Kafka can be reached.
    """
    from pathlib import Path

    from spendfuse.audit.database import Engine, open_embedded, open_server
    from spendfuse.audit.migrate import apply, load_migrations, plan
    from spendfuse.cli import console, operator_entry, target
    from spendfuse.settings import AuditSettings

    settings = AuditSettings.from_env()
    by = operator_entry.named(by, reason)
    if settings.clickhouse_url:
        database = open_server(settings)
    else:
        database = open_embedded(Engine(Path(settings.chdb_dir), settings.database))
    try:
        migrations = load_migrations()
        changed = plan(database, migrations)
        if not check:
            if 0 < len(changed) < len(migrations):
                where = target.find(bootstrap_servers, state_dir)
                about = {"database": database.name, "migrations": [str(each) for each in changed]}
                signer = operator_entry.signer_if_any(where)
                operator_entry.record_if_possible(where, "migrate", about, by, reason, signer)
            changed = apply(database, migrations)
    finally:
        database.close()
    pending = {migration.version for migration in changed}
    word = "to be run" if check else "applied"
    states = [(f"{migration.version:04d}", migration.name, migration.version in pending) for migration in migrations]
    if as_json:
        console.data(
            [
                {"version": version, "name": name, "state": word if new else "up to date"}
                for version, name, new in states
            ]
        )
    else:
        console.table(
            ["migration", "name", "state"],
            [
                [version, name, (word, "yellow" if check else "green") if new else ("up to date", "dim")]
                for version, name, new in states
            ],
        )
    raise typer.Exit(1 if check and pending else 0)


def run(bootstrap_servers: Servers = None, state_dir: StateDir = STATE_DIR) -> None:
    """Write the ledger into ClickHouse until told to stop (Ctrl-C, SIGTERM).

    Without SPENDFUSE_CLICKHOUSE_URL it keeps an embedded ClickHouse, and serves it to readers on loopback.
    """
    from spendfuse.audit.__main__ import main
    from spendfuse.cli import target
    from spendfuse.settings import AuditSettings

    where = target.find(bootstrap_servers, state_dir)
    AuditSettings.from_env(where.env)  # its faults as a sentence, before anything starts
    os.environ.update(where.env)
    raise typer.Exit(main())
