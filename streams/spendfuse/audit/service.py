"""The audit process: migrate, serve the embedded engine to readers, write the ledger until told to stop."""

import asyncio
import json
import os
import secrets
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import structlog

from spendfuse.audit import migrate
from spendfuse.audit.address import Address, remove_address
from spendfuse.audit.checkpoints import NOTES_FILE, Head, NoteSigner, append_note, make_checkpoint, own_key
from spendfuse.audit.database import Database, DatabaseUnavailableError, Engine, open_embedded, open_server
from spendfuse.audit.writer import LedgerWriter
from spendfuse.settings import AuditSettings, BrokerSettings, SettingsError

TOKEN_BYTES: Final = 32
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
    directory = Path(audit.chdb_dir)
    engine = None if audit.clickhouse_url else Engine(directory, audit.database)
    database = await asyncio.to_thread(open_embedded, engine) if engine else await asyncio.to_thread(open_server, audit)
    try:
        applied = await asyncio.to_thread(migrate.apply, database)
        _log.info(
            "database is up to date", database=database.name, migrations=[str(migration) for migration in applied]
        )
        if engine is None:
            await _write(database, broker, audit, stop, ready_file, lambda: ready(None))
            return
        await _serve_and_write(engine, database, broker, audit, stop, ready_file, ready)
    finally:
        await asyncio.to_thread(database.close)


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
        await _write(database, broker, audit, stop, ready_file, lambda: ready(address))
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
) -> None:
    writer = LedgerWriter(
        broker,
        database,
        rows_max=audit.batch_rows_max,
        wait_ms=audit.batch_wait_ms,
        checkpoint=await asyncio.to_thread(_checkpointer, audit, database.name),
        checkpoint_s=audit.checkpoint_s,
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
