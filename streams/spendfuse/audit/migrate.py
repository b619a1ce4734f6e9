"""Migrations: the files of `sql/migrations`, run forward once each; their SHA-256 is kept, so that history holds."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from typing import Any, Final

from spendfuse.audit.database import Database
from spendfuse.audit.files import sql_directory
from spendfuse.audit.rows import Table
from spendfuse.wire.topics import LEDGER_RETENTION_DAYS

_FILE_NAME: Final = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql")
_VARIABLE: Final = re.compile(r"\$\{([A-Z_]+)\}")
# What a `;` may hide in, or a whole statement's end.
_TOKEN: Final = re.compile(
    r"--[^\n]*|/\*.*?\*/|'(?:\\.|''|[^'\\])*'|`(?:\\.|[^`\\])*`|\"(?:\\.|[^\"\\])*\"|(?P<end>;)[ \t]*(?=\r?\n|\Z)",
    re.DOTALL,
)


class MigrationError(Exception):
    """The migrations and the database disagree; the message says about which file and what to do."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One file: its number, its name and the SHA-256 of its bytes in hex."""

    version: int
    name: str
    sha256: str
    sql: str

    def __str__(self) -> str:
        return f"{self.version:04d}_{self.name}.sql"


def load_migrations(directory: Traversable | None = None) -> tuple[Migration, ...]:
    """Return the migrations in order; raises MigrationError for a name or a number that is not right."""
    found: dict[int, Migration] = {}
    for entry in (directory or sql_directory() / "migrations").iterdir():
        if not entry.name.endswith(".sql"):
            continue
        match = _FILE_NAME.fullmatch(entry.name)
        if match is None:
            raise MigrationError(f"{entry.name} is not named NNNN_name.sql: rename it")
        raw = entry.read_bytes()
        migration = Migration(int(match[1]), match[2], hashlib.sha256(raw).hexdigest(), raw.decode())
        twin = found.setdefault(migration.version, migration)
        if twin is not migration:
            raise MigrationError(f"{twin} and {migration} have the same number: renumber the newer one")
    return tuple(found[version] for version in sorted(found))


def split_statements(sql: str) -> Iterator[str]:
    """Yield the statements of a file: each ends with `;` at the end of a line, outside quotes and comments."""
    start = 0
    for token in _TOKEN.finditer(sql):
        if token["end"]:
            yield sql[start : token.start("end")].strip()
            start = token.end()
    rest = sql[start:]
    if _TOKEN.sub("", rest).strip():
        yield rest.strip()


def plan(database: Database, migrations: Sequence[Migration]) -> list[Migration]:
    """Return what is still to be run, in order.

    Raises MigrationError when a file that has been run was changed, is gone, or when one was slipped in before it.
    """
    applied = _applied(database)
    known = {migration.version: migration for migration in migrations}
    for version, (name, sha256) in sorted(applied.items()):
        migration = known.get(version)
        if migration is None:
            raise MigrationError(
                f"database {database.name} has seen migration {version:04d}_{name}.sql, which this version of "
                "spendfuse does not know: upgrade spendfuse"
            )
        if migration.sha256 != sha256:
            raise MigrationError(
                f"{migration} was changed after it was run in database {database.name} (SHA-256 {sha256[:12]}... then, "
                f"{migration.sha256[:12]}... now): restore it and put the change into a new migration"
            )
    pending = [migration for migration in migrations if migration.version not in applied]
    if pending and applied and pending[0].version < max(applied):
        raise MigrationError(
            f"{pending[0]} comes before {max(applied):04d}, which database {database.name} has seen: "
            "give it the next number"
        )
    return pending


def apply(database: Database, migrations: Sequence[Migration] | None = None) -> list[Migration]:
    """Run what is still to be run and return it; run again, it does nothing.

    Every statement is idempotent, so a crash between a file and the note of it is healed by the next run.
    """
    migrations = load_migrations() if migrations is None else migrations
    pending = plan(database, migrations)
    variables = {"DB": database.name, "TTL_DAYS": str(LEDGER_RETENTION_DAYS)}
    for migration in pending:
        for statement in split_statements(migration.sql):
            database.command(_substitute(statement, variables, migration))
        note: dict[str, list[Any]] = {
            "version": [migration.version],
            "name": [migration.name],
            "sha256": [migration.sha256],
        }
        database.insert(Table("schema_migrations", note), f"{migration.sha256}:{migration.version}")
    return pending


def _applied(database: Database) -> dict[int, tuple[str, str]]:
    there = database.query(
        "SELECT count() FROM system.tables WHERE database = {db:String} AND name = 'schema_migrations'"
    )
    if not there[0][0]:
        return {}
    rows = database.query("SELECT version, name, sha256 FROM {db:Identifier}.schema_migrations")
    return {version: (name, _text(sha256)) for version, name, sha256 in rows}


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _substitute(statement: str, variables: dict[str, str], migration: Migration) -> str:
    unknown = sorted(set(_VARIABLE.findall(statement)) - set(variables))
    if unknown:
        raise MigrationError(
            f"{migration} uses {', '.join(unknown)}, which nobody sets: it may use {', '.join(variables)}"
        )
    return _VARIABLE.sub(lambda match: variables[match[1]], statement)
