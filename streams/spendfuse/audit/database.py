"""ClickHouse through clickhouse-connect: a server, or chDB (the engine in this process), by the same few calls."""

import fcntl
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal
from urllib.parse import unquote, urlencode, urlsplit
from xml.sax.saxutils import escape

import clickhouse_connect
from clickhouse_connect.driver.exceptions import ClickHouseError

from spendfuse.audit.roles import grants
from spendfuse.audit.rows import Table
from spendfuse.settings import AuditSettings

if TYPE_CHECKING:
    from clickhouse_connect.driver.client import Client

INSERT_SETTINGS: Final[Mapping[str, int]] = {
    "async_insert": 0,
    "insert_deduplicate": 1,
    "deduplicate_blocks_in_dependent_materialized_views": 1,
    # A batch of a replay may touch more months than the default of 100 allows; it must never be stuck for that.
    "max_partitions_per_insert_block": 0,
}
"""Sent with every insert: without them a repeated insert is not recognised, in the table or in its views."""
CONNECT_TIMEOUT_S: Final = 5
SEND_RECEIVE_TIMEOUT_S: Final = 60
Rights = Literal["writer", "operator"]
FINAL_CODES: Final = frozenset({62, 81, 192, 193, 194, 497, 516})
"""Refusals that stay: syntax error, unknown database, unknown user, wrong or no password, access denied, and such."""
SCHEMES: Final = {"http": 8123, "https": 8443}
_DATABASE_NAME: Final = re.compile(r"[a-z_][a-z0-9_]{0,62}")


class DatabaseUnavailableError(Exception):
    """ClickHouse cannot be opened or reached; the message says which one and what to do."""


class DatabaseAwayError(DatabaseUnavailableError):
    """The server does not answer, or not yet as it should: it may do so when it is asked again."""


class Database:
    """One ClickHouse database: insert with a token, query, command. Blocking; one caller at a time."""

    def __init__(self, client: "Client", name: str, owned: BinaryIO | None = None) -> None:
        """Take a client, and with it the lock file that says who owns an embedded engine."""
        self.name = name
        self._client = client
        self._owned = owned
        self._types: dict[tuple[str, ...], list[Any]] = {}

    def insert(self, table: Table, token: str) -> None:
        """Insert the rows of one table; the same token a second time changes nothing, in it or in its views."""
        if not table.rows:
            return
        names = list(table.columns)
        key = (table.name, *names)  # a batch of the first version, finished by this one, has fewer columns
        types = self._types.get(key)
        if types is None:  # described once: the tables only ever gain columns
            context = self._client.create_insert_context(table.name, names, self.name)
            types = self._types[key] = list(context.column_types)
        self._client.insert(
            table.name,
            [list(column) for column in table.columns.values()],
            names,
            self.name,
            column_types=types,
            column_oriented=True,
            settings={**INSERT_SETTINGS, "insert_deduplication_token": token},
        )

    def query(self, sql: str, parameters: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
        """Return the rows of a query; `{db:Identifier}` in it is this database, other binds are the parameters."""
        result = self._client.query(sql, parameters={"db": self.name, **(parameters or {})})
        return [tuple(row) for row in result.result_rows]

    def command(self, sql: str) -> None:
        """Run one statement that returns nothing."""
        self._client.command(sql)

    def close(self) -> None:
        """Close the connection, or this handle of the engine."""
        self._client.close()
        if self._owned is not None:
            self._owned.close()


@dataclass(frozen=True, slots=True)
class Engine:
    """The embedded engine's directory: its own files under `engine/`, and the grants its only user has."""

    directory: Path
    database: str
    rights: Rights = "writer"

    @property
    def path(self) -> str:
        """Return the absolute path of the engine's files."""
        return str((self.directory / "engine").resolve())

    @property
    def options(self) -> dict[str, str]:
        """Return the options every handle must be opened with; the first one fixes them for the process."""
        return {"config-file": str(self._file("config").resolve())}

    @property
    def connection(self) -> str:
        """Return what `chdb.connect` takes for a further handle."""
        return f"{self.path}?{urlencode(self.options)}"

    def prepare(self) -> None:
        """Write the engine's grants: append-only by right, not by promise.

        A writer has no DROP TABLE, TRUNCATE, ALTER UPDATE or DELETE; migrations may create and add. An operator may
        drop months of usage and replace rollups, and touch nothing else. Nobody has files, urls or other sources.
        """
        # The process that writes also migrates, and a migrator may do all that a writer may.
        rights = grants("migrator" if self.rights == "writer" else self.rights, self.database)
        rights.append("GRANT SHOW, SELECT ON information_schema.*")
        queries = "\n".join(f"      <query>{escape(each)}</query>" for each in rights)
        users = self._file("users")
        users.write_text(_USERS.format(grants=queries), encoding="utf-8")
        self._file("config").write_text(_CONFIG.format(users=escape(str(users.resolve()))), encoding="utf-8")

    def _file(self, name: str) -> Path:
        return self.directory / (f"{name}.xml" if self.rights == "writer" else f"{name}-{self.rights}.xml")


_CONFIG: Final = """<clickhouse>
  <user_directories><users_xml><path>{users}</path></users_xml></user_directories>
</clickhouse>
"""
_USERS: Final = """<clickhouse>
  <profiles><default/></profiles>
  <quotas><default/></quotas>
  <users><default>
    <password></password><profile>default</profile><quota>default</quota><networks><ip>::/0</ip></networks>
    <grants>
{grants}
    </grants>
  </default></users>
</clickhouse>
"""


def open_embedded(engine: Engine) -> Database:
    """Open the embedded engine, which from then on belongs to this process alone.

    Raises DatabaseUnavailableError when chDB is not installed or another process has the directory.
    """
    if not _DATABASE_NAME.fullmatch(engine.database):
        raise DatabaseUnavailableError(f"{engine.database!r} is not a database name: use a-z, 0-9 and _")
    engine.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    owned = _own(engine.directory)
    try:
        engine.prepare()
        client = clickhouse_connect.get_client(interface="chdb", path=engine.path, chdb_options=engine.options)
    except ImportError as error:
        owned.close()
        raise DatabaseUnavailableError(
            "the embedded ClickHouse needs the chdb package: pip install 'spendfuse[embedded]', "
            "or name a server in SPENDFUSE_CLICKHOUSE_URL"
        ) from error
    except ClickHouseError as error:
        owned.close()
        raise DatabaseUnavailableError(
            f"the embedded ClickHouse in {engine.directory} does not open: {error}"
        ) from error
    return Database(client, engine.database, owned)


def _own(directory: Path) -> BinaryIO:
    """Lock the directory for this process: the engine's own refusal does not say why it refuses."""
    lock = (directory / "owner.lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise DatabaseUnavailableError(
            f"{directory} belongs to another audit process that is running: stop it, "
            "or give this one a directory of its own in SPENDFUSE_CHDB_DIR"
        ) from error
    return lock


def open_server(settings: AuditSettings) -> Database:
    """Connect to the ClickHouse server of the settings; raises DatabaseUnavailableError."""
    return Database(connect_server(settings), database_name(settings))


def connect_server(settings: AuditSettings, database: str | None = None) -> "Client":
    """Return a client of the server in `clickhouse_url`; without a database none is chosen (it may not exist yet)."""
    url = urlsplit(settings.clickhouse_url)
    if url.scheme not in SCHEMES or not url.hostname:
        raise DatabaseUnavailableError(
            "SPENDFUSE_CLICKHOUSE_URL is not of the form http(s)://user@host:port/database: correct it"
        )
    if url.password is not None:
        raise DatabaseUnavailableError(
            "SPENDFUSE_CLICKHOUSE_URL holds a password: take it out and give it as SPENDFUSE_CLICKHOUSE_PASSWORD(_FILE)"
        )
    try:
        port = url.port or SCHEMES[url.scheme]
        return clickhouse_connect.get_client(
            interface=url.scheme,
            host=url.hostname,
            port=port,
            username=unquote(url.username or "default"),
            password=settings.clickhouse_password.get_secret_value(),
            database=database or "default",
            connect_timeout=CONNECT_TIMEOUT_S,
            send_receive_timeout=SEND_RECEIVE_TIMEOUT_S,
            autogenerate_session_id=False,
        )
    except (ClickHouseError, ValueError) as error:
        kind = DatabaseAwayError if is_away(error) else DatabaseUnavailableError
        raise kind(
            f"the ClickHouse server at {url.hostname} (SPENDFUSE_CLICKHOUSE_URL) does not answer: {error}"
        ) from error


def is_away(error: BaseException) -> bool:
    """Say whether asking again may help: not after a refusal that a person must heal, such as a wrong password."""
    return isinstance(error, ClickHouseError) and getattr(error, "code", None) not in FINAL_CODES


def database_name(settings: AuditSettings) -> str:
    """Return the database: the one in the server's URL, else the setting; raises DatabaseUnavailableError."""
    name = urlsplit(settings.clickhouse_url).path.strip("/") or settings.database
    if not _DATABASE_NAME.fullmatch(name):
        raise DatabaseUnavailableError(
            f"{name!r} is not a database name: use a-z, 0-9 and _ (SPENDFUSE_DATABASE or SPENDFUSE_CLICKHOUSE_URL)"
        )
    return name
