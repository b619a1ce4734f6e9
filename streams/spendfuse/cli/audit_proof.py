"""`spendfuse audit verify | prove | export`: what an auditor asks, who need trust nobody."""

from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from spendfuse.cli.options import STATE_DIR, Json, StateDir, command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from spendfuse.audit.database import Database
    from spendfuse.audit.verify import Report
    from spendfuse.settings import AuditSettings

PROOF_BYTES_MAX: Final = 268_435_456
_DAY_CHARS: Final = 10

From = Annotated[
    str | None,
    typer.Option(
        "--from", metavar="TIME", help="Only what the ledger took from this day or RFC 3339 instant (UTC) on."
    ),
]
To = Annotated[
    str | None,
    typer.Option("--to", metavar="TIME", help="Only what it took until then; a day counts as a whole."),
]
CheckpointFile = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        metavar="FILE",
        help="Signed checkpoints to hold the chains against, best from a place the database's keeper cannot reach; "
        "an embedded audit's own file otherwise.",
    ),
]


def register(audit: typer.Typer) -> None:
    """Add the commands to `spendfuse audit`."""
    command(
        audit, verify,
        "spendfuse audit verify",
        "spendfuse audit verify --from 2026-11-01 --to 2026-11-30 --checkpoint /mnt/worm/checkpoints.notes",
    )  # fmt: skip
    command(
        audit, prove,
        "spendfuse audit prove msg_01XyzAbc --out proof.json",
        "spendfuse audit prove --check proof.json",
    )  # fmt: skip
    command(
        audit, export,
        "spendfuse audit export bundle",
        "spendfuse audit export bundle --from 2026-11-01 --to 2026-11-30 --format jsonl",
    )  # fmt: skip


def verify(
    since: From = None,
    until: To = None,
    checkpoint: CheckpointFile = None,
    state_dir: StateDir = STATE_DIR,
    as_json: Json = False,
) -> None:
    """Say whether the trail is what was sealed, or which batch is not and why; exit 1 if any is not.

    The database recomputes every row's hash, every batch's root and the chain of headers. Of a chain alone nobody can
    say where it ended: that, and a trail rewritten as a whole, is found with a checkpoint.
    """
    from spendfuse.audit import verify as verifying

    settings, env = _settings(state_dir)
    checkpoints, known_by = _checkpoints(settings, checkpoint)
    with _opened(settings) as database, _progress("verifying") as progress:
        report = verifying.verify(
            database,
            now=datetime.now(UTC),
            since=_instant(since, verifying.BEGINNING),
            until=_instant(until, verifying.END, whole_day=True),
            checkpoints=checkpoints,
            dropped_before=_dropped_before(database, env),
            progress=progress,
        )
    if as_json:
        _verdict_as_data(report)
    else:
        _show(report, known_by)
    raise typer.Exit(0 if report.intact else 1)


def prove(
    identity: Annotated[
        str | None,
        typer.Argument(metavar="ID", help="Id of a usage, a command or an alert; or topic/partition/offset."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="File for the proof; else standard output.")] = None,
    check: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Check a proof instead; needs no database.")
    ] = None,
    checkpoint: CheckpointFile = None,
    state_dir: StateDir = STATE_DIR,
) -> None:
    """Prove that a row was sealed: its fields, its path to its batch's root, and the chain to a signed checkpoint.

    The proof is JSON. Whoever has it and the audit's public key needs neither the database nor us to check it.
    """
    import json

    from spendfuse.audit.export import NoSuchRowError
    from spendfuse.audit.export import prove as proofs_of
    from spendfuse.cli import console
    from spendfuse.cli.faults import CliError, usage_error

    settings, _ = _settings(state_dir)
    if check is not None:
        _check(check, settings)
        return
    if identity is None:
        raise usage_error("say whose proof: give an ID, or --check FILE")
    notes = _notes(settings, checkpoint)
    with _opened(settings) as database:
        try:
            proofs = proofs_of(database, _raw(database), identity, notes)
        except NoSuchRowError as error:
            raise CliError(str(error)) from error
    text = json.dumps(proofs, ensure_ascii=False, indent=1) + "\n"
    if out is None:
        typer.echo(text, nl=False)
        return
    out.write_text(text, encoding="utf-8")
    console.line(f"{len(proofs)} proofs in {out}: check them with `spendfuse audit prove --check {out}`")


def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="New directory for the bundle.")],
    since: From = None,
    until: To = None,
    file_format: Annotated[
        Literal["parquet", "jsonl"],
        typer.Option("--format", help="parquet, or gzipped JSON lines, which a verifier reads with Python alone."),
    ] = "parquet",
    checkpoint: CheckpointFile = None,
    state_dir: StateDir = STATE_DIR,
    as_json: Json = False,
) -> None:
    """Write rows, headers and checkpoints as a bundle that deploy/verifier/verify.py checks without spendfuse.

    All headers go in, and the rows of the batches that were asked for.
    """
    from spendfuse.audit import export as exporting
    from spendfuse.audit.verify import BEGINNING, END
    from spendfuse.cli import console
    from spendfuse.cli.faults import EXIT_SETTINGS, CliError

    settings, _ = _settings(state_dir)
    path = _checkpoint_path(settings, checkpoint)
    with _opened(settings) as database, _progress("exporting") as progress:
        try:
            bundle = exporting.export(
                database,
                _raw(database),
                directory,
                file_format=file_format,
                now=datetime.now(UTC),
                since=_instant(since, BEGINNING),
                until=_instant(until, END, whole_day=True),
                notes=path.read_bytes() if path else b"",
                progress=progress,
            )
        except FileExistsError as error:
            raise CliError(str(error), EXIT_SETTINGS) from error
    if as_json:
        console.data(
            {"directory": str(directory), "files": bundle.files, "rows": bundle.rows, "batches": bundle.batches}
        )
        return
    console.line(f"{bundle.rows:,} rows of {bundle.batches:,} batches in {bundle.files} files in {directory}")
    console.line(f"check them anywhere: python deploy/verifier/verify.py {directory} --key NAME=BASE64")


def _settings(state_dir: Path) -> "tuple[AuditSettings, Mapping[str, str]]":
    from spendfuse.cli import target
    from spendfuse.settings import AuditSettings

    env = target.find(None, state_dir).env
    return AuditSettings.from_env(env), env


@contextmanager
def _opened(settings: "AuditSettings") -> "Iterator[Database]":
    """Open the trail to read: at a server, at the audit process that runs, or in the directory of one that does not."""
    from clickhouse_connect.driver.exceptions import ClickHouseError

    from spendfuse.audit.address import AuditNotRunningError, read_address
    from spendfuse.audit.database import Database, Engine, database_name, open_embedded
    from spendfuse.audit.queries import connect, connect_to
    from spendfuse.cli.faults import EXIT_UNAVAILABLE, CliError

    directory, owned = Path(settings.chdb_dir), False
    if settings.clickhouse_url:
        database = Database(connect(settings), database_name(settings))
    else:
        try:
            address = read_address(directory)
            database = Database(connect_to(address), address.database)
        except AuditNotRunningError:
            if not (directory / "engine").is_dir():
                raise
            database, owned = open_embedded(Engine(directory, settings.database)), True
    try:
        if not database.query(_SEALED)[0][0]:
            raise CliError("this trail has no seals yet: run `spendfuse audit migrate`, or upgrade the audit process")
        if owned:  # a client has its database chosen for it
            database.command(f"USE {database.name}")
        yield database
    except ClickHouseError as error:
        raise CliError(f"ClickHouse does not answer: {str(error)[:500]}", EXIT_UNAVAILABLE) from error
    finally:
        database.close()


_SEALED: Final = """
SELECT count() FROM system.columns WHERE database = {db:String} AND table = 'audit_batches' AND name = 'header_hash'
"""


def _raw(database: "Database") -> "Callable[[str, Mapping[str, Any], str], bytes]":
    client = database._client  # noqa: SLF001 - answers in ClickHouse's own formats are asked for here alone

    def raw(statement: str, binds: "Mapping[str, Any]", output_format: str) -> bytes:
        answer = client.raw_query(statement, parameters={"db": database.name, **binds}, fmt=output_format)
        return bytes(answer)

    return raw


def _instant(text: str | None, default: datetime, *, whole_day: bool = False) -> datetime:
    from spendfuse.cli.faults import usage_error

    if text is None:
        return default
    try:
        instant = datetime.fromisoformat(text)
    except ValueError as error:
        raise usage_error(f"{text[:40]!r} is no time: write a day such as 2026-11-01, or an instant") from error
    if instant.tzinfo is None:
        instant = instant.replace(tzinfo=UTC)
    return instant + timedelta(days=1) if whole_day and len(text) == _DAY_CHARS else instant.astimezone(UTC)


def _keys(settings: "AuditSettings") -> "tuple[dict[str, bytes], str]":
    """Return the public keys that checkpoints are checked with, and whence they are known."""
    from spendfuse.audit.checkpoints import PUBLIC_KEY_FILE
    from spendfuse.client.keys import parse_keys
    from spendfuse.settings import SettingsError

    own = Path(settings.chdb_dir) / PUBLIC_KEY_FILE
    if settings.audit_public_keys:
        text, known_by = settings.audit_public_keys, "SPENDFUSE_AUDIT_PUBLIC_KEYS"
    elif own.exists():
        text, known_by = own.read_text(encoding="utf-8"), f"{own}, which the audit's own machine keeps"
    else:
        return {}, ""
    try:
        return parse_keys(text), known_by
    except ValueError as error:
        raise SettingsError(f"{known_by}: {error}") from error


def _checkpoint_path(settings: "AuditSettings", given: Path | None) -> Path | None:
    from spendfuse.audit.checkpoints import NOTES_FILE

    if given is not None:
        return given
    own = Path(settings.checkpoint_file) if settings.checkpoint_file else Path(settings.chdb_dir) / NOTES_FILE
    return own if own.exists() else None


def _checkpoints(settings: "AuditSettings", given: Path | None) -> tuple[list[Any], str]:
    """Return the checkpoints to hold the chains against, and whence their key is known."""
    from spendfuse.audit.checkpoints import CheckpointError, read_notes
    from spendfuse.cli.faults import EXIT_SETTINGS, CliError

    path = _checkpoint_path(settings, given)
    if path is None:
        return [], ""
    keys, known_by = _keys(settings)
    if not keys:
        raise CliError(
            f"{path} can be held against nothing without the audit's public key: set SPENDFUSE_AUDIT_PUBLIC_KEYS",
            EXIT_SETTINGS,
        )
    try:
        return read_notes(path, keys), f"{path}, checked with {known_by}"
    except CheckpointError as error:
        raise CliError(str(error)) from error


def _notes(settings: "AuditSettings", given: Path | None) -> "list[tuple[str, Mapping[int, int]]]":
    """Return the signed notes there are, each with its heads; none without a file or a key."""
    from spendfuse.audit.checkpoints import CheckpointError, open_note, split_notes
    from spendfuse.cli.faults import CliError

    path = _checkpoint_path(settings, given)
    keys, _ = _keys(settings)
    if path is None or not keys:
        return []
    try:
        return [
            (note, {head.partition: head.seq for head in open_note(note, keys).heads})
            for note in split_notes(path.read_text(encoding="utf-8"))
        ]
    except (CheckpointError, UnicodeDecodeError) as error:
        raise CliError(f"{path}: {error}") from error


def _dropped_before(database: "Database", env: "Mapping[str, str]") -> datetime:
    """Return the instant before which usage was dropped by a signed entry; without keys none is believed."""
    from spendfuse.audit.retention import dropped_before
    from spendfuse.audit.verify import BEGINNING
    from spendfuse.cli.target import OperatorSettings
    from spendfuse.client.keys import Verifier
    from spendfuse.settings import SettingsError

    keys = OperatorSettings.from_env(env).public_keys
    if not keys:
        return BEGINNING
    try:
        return dropped_before(database, Verifier.parse(keys))
    except ValueError as error:
        raise SettingsError(f"SPENDFUSE_PUBLIC_KEYS cannot be used: {error}") from error


def _check(path: Path, settings: "AuditSettings") -> None:
    import json

    from spendfuse.audit.checkpoints import CheckpointError
    from spendfuse.audit.export import ProofError, check_proof
    from spendfuse.cli import console
    from spendfuse.cli.faults import CliError

    with path.open("rb") as file:
        raw = file.read(PROOF_BYTES_MAX)
    keys, _ = _keys(settings)
    try:
        proofs = json.loads(raw)
        sentences = [check_proof(each, keys) for each in (proofs if isinstance(proofs, list) else [proofs])]
    except (ValueError, RecursionError, ProofError, CheckpointError) as error:
        raise CliError(f"{path}: {error}") from error
    for sentence in sentences:
        console.line(sentence, "green")


@contextmanager
def _progress(what: str) -> "Iterator[Callable[[int, int], None]]":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from spendfuse.cli import console

    err = console.err()
    if not err.is_terminal:
        yield lambda _done, _total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as shown:
        task = shown.add_task(f"{what} rows", total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def _verdict_as_data(report: "Report") -> None:
    from dataclasses import asdict

    from spendfuse.cli import console

    console.data({"intact": report.intact, **asdict(report)})


def _show(report: "Report", known_by: str) -> None:
    from spendfuse.cli import console

    if report.intact:
        console.line(f"intact: {report.rows:,} rows in {report.batches:,} batches are what was sealed", "green")
    else:
        console.line(f"NOT intact: {len(report.findings):,} findings among {report.rows:,} rows", "red")
        console.table(
            ["partition", "batch", "cause", "what"],
            [[str(each.partition), str(each.seq or "-"), (each.cause, "red"), each.detail] for each in report.findings],
            right=["partition", "batch"],
        )
    for count, text in (
        (report.expired, "batches have expired, in whole or in part: their headers are checked, what is left is not"),
        (report.unsealed_rows, "rows were written before there were seals: only their number is checked"),
        (report.in_flight_rows, "rows are of a batch that is being written: verify again later"),
    ):
        if count:
            console.line(f"{count:,} {text}", "yellow")
    if report.checkpoints:
        console.line(f"{report.heads:,} heads of {report.checkpoints:,} checkpoints ({known_by}) were looked up")
    else:
        console.line(
            "without a checkpoint a cut tail, or a trail rewritten as a whole, is not seen: --checkpoint", "dim"
        )
