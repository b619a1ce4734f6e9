"""The audit process: migrate, serve the embedded engine to readers, write the ledger until told to stop."""

import asyncio
import contextlib
import json
import os
import secrets
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import structlog
from clickhouse_connect.driver.exceptions import ClickHouseError

from spendfuse.audit import migrate, operator
from spendfuse.audit.address import Address, remove_address
from spendfuse.audit.checkpoints import NOTES_FILE, Head, NoteSigner, append_note, make_checkpoint, own_key
from spendfuse.audit.database import (
    Database,
    DatabaseAwayError,
    DatabaseUnavailableError,
    Engine,
    is_away,
    open_embedded,
    open_server,
)
from spendfuse.audit.writer import LedgerWriter
from spendfuse.settings import AuditSettings, BrokerSettings, SettingsError

TOKEN_BYTES: Final = 32
MIGRATOR: Final = "spendfuse-audit"
"""Who migrates when nobody does it by hand: the audit process, at its start."""
OPEN_RETRY_S_MIN: Final = 0.5
OPEN_RETRY_S_MAX: Final = 30.0
OPEN_WAIT_S_MAX: Final = 86_400.0
"""A server that has not answered for a day is not away, it is gone: the process ends, and whoever minds it hears so."""
STOP_GRACE_S: Final = 15.0

_log = structlog.get_logger(__name__)


async def run(
    audit: AuditSettings,
    broker: BrokerSettings,
    *,
    stop: asyncio.Event | None = None,
    ready_file: Path | None = None,
    ready: Callable[[Address | None], None] = lambda _address: None,
) -> None:
    """Run until `stop` is set; embedded when the settings name no server.

    `ready` is called (and `ready_file` written) once every assigned ledger partition has been taken over, with the
    endpoint's address when embedded. Raises DatabaseUnavailableError, MigrationError, TrailError, OSError.
    """
    stop = stop or asyncio.Event()
    engine = None if audit.clickhouse_url else Engine(Path(audit.chdb_dir), audit.database)
    opened = await _opened(engine, audit, stop)
    if opened is None:
        return
    database, applied = opened
    said = _migrated(database, applied)
    try:
        if engine is None:
            await _write(database, broker, audit, stop, ready_file, lambda: ready(None), said)
            return
        await _serve_and_write(engine, database, broker, audit, stop, ready_file, ready, said)
    finally:
        await asyncio.to_thread(database.close)


async def _opened(
    engine: Engine | None, audit: AuditSettings, stop: asyncio.Event
) -> tuple[Database, Sequence[migrate.Migration]] | None:
    """Return the database, up to date, and what was run for it; None when told to stop before a server answers.

    Nothing is sealed meanwhile: the ledger waits in Kafka, as it does when the server goes away later. Raises
    DatabaseUnavailableError for what waiting does not heal, and when the wait was OPEN_WAIT_S_MAX long.
    """
    loop = asyncio.get_running_loop()
    began, delay_s, tries = loop.time(), OPEN_RETRY_S_MIN, 0
    while not stop.is_set():
        tries += 1
        try:
            database, applied = await asyncio.to_thread(_open, engine, audit)
        except DatabaseAwayError as error:
            waited_s = loop.time() - began
            if waited_s > OPEN_WAIT_S_MAX:
                raise
            _log.warning(
                "the audit waits for ClickHouse; the ledger waits in Kafka, and halts go on", error=str(error)[:500],
                tries=tries, waited_s=round(waited_s), retry_s=delay_s,
            )  # fmt: skip
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), delay_s)
            delay_s = min(delay_s * 2, OPEN_RETRY_S_MAX)
        else:
            _log.info(
                "database is up to date", database=database.name, migrations=[str(each) for each in applied],
                tries=tries, waited_s=round(loop.time() - began),
            )  # fmt: skip
            return database, applied
    return None


def _migrated(database: Database, applied: Sequence[migrate.Migration]) -> Sequence[bytes]:
    """Return the ledger's entry of a migration of a database that was there before; none of one that is new."""
    if not 0 < len(applied) < len(migrate.load_migrations()):
        return ()
    about = {"database": database.name, "migrations": [str(each) for each in applied]}
    now = datetime.now(UTC)
    return (operator.message("migrate", about, by=MIGRATOR, reason="an upgrade was started", at=now, signer=None),)


def _open(engine: Engine | None, audit: AuditSettings) -> tuple[Database, Sequence[migrate.Migration]]:
    """Open and migrate; a server that goes away in between is away."""
    database = open_embedded(engine) if engine else open_server(audit)
    try:
        return database, migrate.apply(database)
    except ClickHouseError as error:
        database.close()
        kind = DatabaseAwayError if engine is None and is_away(error) else DatabaseUnavailableError
        raise kind(f"database {database.name} cannot be brought up to date: {str(error)[:500]}") from error
    except BaseException:
        database.close()
        raise


def _checkpointer(audit: AuditSettings, database: str) -> Callable[[Sequence[Head]], str] | None:
    """Return what signs the chains' heads and keeps the note in the file; None without a key."""
    directory = Path(audit.chdb_dir)
    key = audit.audit_key.get_secret_value() or ("" if audit.clickhouse_url else own_key(directory))
    if not key:
        _log.warning("no checkpoints are signed: set SPENDFUSE_AUDIT_KEY_FILE (make a key with `spendfuse keys new`)")
        return None
    try:
        signer = NoteSigner.parse(key)
    except ValueError as error:
        raise SettingsError(f"SPENDFUSE_AUDIT_KEY cannot be used: {error}") from error
    path = Path(audit.checkpoint_file) if audit.checkpoint_file else directory / NOTES_FILE

    def keep(heads: Sequence[Head]) -> str:
        note = signer.sign(make_checkpoint(f"spendfuse/{database}", datetime.now(UTC), heads))
        append_note(path, note)
        return note

    return keep


async def _serve_and_write(
    engine: Engine,
    database: Database,
    broker: BrokerSettings,
    audit: AuditSettings,
    stop: asyncio.Event,
    ready_file: Path | None,
    ready: Callable[[Address | None], None],
    said: Sequence[bytes],
) -> None:
    from spendfuse.audit.endpoint import Endpoint  # noqa: PLC0415 - it needs chDB, which a server deployment lacks

    token = audit.http_token.get_secret_value() or secrets.token_urlsafe(TOKEN_BYTES)
    endpoint = Endpoint(engine, token, audit.http_port)
    try:
        address = await endpoint.start()
    except OSError as error:
        raise DatabaseUnavailableError(
            f"port {audit.http_port} of 127.0.0.1 is taken: choose another in SPENDFUSE_HTTP_PORT, or 0 for a free one"
        ) from error
    try:
        address.write(engine.directory)
        _log.info("endpoint", url=address.url)
        await _write(database, broker, audit, stop, ready_file, lambda: ready(address), said)
    finally:
        remove_address(engine.directory)
        await endpoint.stop()


async def _write(
    database: Database,
    broker: BrokerSettings,
    audit: AuditSettings,
    stop: asyncio.Event,
    ready_file: Path | None,
    ready: Callable[[], None],
    said: Sequence[bytes],
) -> None:
    writer = LedgerWriter(
        broker,
        database,
        rows_max=audit.batch_rows_max,
        wait_ms=audit.batch_wait_ms,
        checkpoint=await asyncio.to_thread(_checkpointer, audit, database.name),
        checkpoint_s=audit.checkpoint_s,
        said=said,
    )
    told = False

    def tell() -> None:
        nonlocal told
        if not told:
            told = True
            _log.info("ready")
            ready()
            if ready_file is not None:
                ready_file.write_text(json.dumps({"pid": os.getpid()}) + "\n", encoding="utf-8")

    writing = asyncio.create_task(writer.run(tell), name="ledger writer")
    stopping = asyncio.create_task(stop.wait(), name="stop")
    try:
        await asyncio.wait({writing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        writer.stop()
        await asyncio.wait({writing}, timeout=STOP_GRACE_S)
    finally:
        stopping.cancel()
        writing.cancel()
        await asyncio.gather(stopping, writing, return_exceptions=True)
        if ready_file is not None:
            await asyncio.to_thread(ready_file.unlink, missing_ok=True)
    if not writing.cancelled():
        writing.result()
