"""`spendfuse usage`: emit one usage, import a table of them, or correct one that was charged."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from spendfuse.cli.correct import correct
from spendfuse.cli.options import STATE_DIR, Json, Servers, StateDir, command, duration, examples

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spendfuse.adapters.table import RowError
    from spendfuse.cli.kafka import Placed
    from spendfuse.cli.target import Target
    from spendfuse.wire.usage import Usage

CHUNK_ROWS: Final = 2_000
"""Rows read and sent at a time: what is not yet acknowledged is never more."""
ERRORS_SHOWN_MAX: Final = 20
ERRORS_KEPT_MAX: Final = 1_000
STDIN_BYTES_MAX: Final = 1_048_576
SECOND_US: Final = 1_000_000

usage = typer.Typer(
    help="Emit usage by hand, import it from a table, or correct what was charged.",
    no_args_is_help=True,
    epilog=examples("spendfuse usage emit --help", "spendfuse usage import --help"),
)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(
        usage,
        emit,
        "spendfuse usage emit --workspace acme --team research --agent planner-7 --provider anthropic "
        "--model claude-sonnet-4-6 --input 1200 --output 250",
        "spendfuse usage emit --stdin < usage.json",
    )
    command(
        usage,
        import_,
        "spendfuse usage import AzureLLMInferenceTrace_code.csv --preset azure-llm-2023 --start '2h ago'",
        "spendfuse usage import calls.csv --map ts=time --map input=prompt_tokens --map output=completion_tokens "
        "--map agent=service --map provider=\"'openai'\" --map model=model",
        "spendfuse usage import calls.jsonl --mapping mapping.yaml --dry-run",
        name="import",
    )
    command(
        usage,
        correct,
        "spendfuse usage correct call-7f3a --output 1200 --reason provider_final --by ada",
        "spendfuse usage correct call-7f3a --cost 0.0125 --reason invoice --note INV-2026-11 --by ada --yes",
    )
    app.add_typer(usage, name="usage")


def emit(
    workspace: Annotated[str | None, typer.Option(help="Workspace; else SPENDFUSE_WORKSPACE.")] = None,
    team: Annotated[str | None, typer.Option(help="Team; else SPENDFUSE_TEAM.")] = None,
    agent: Annotated[str | None, typer.Option(help="Agent; else SPENDFUSE_AGENT.")] = None,
    run: Annotated[str | None, typer.Option(help="Run; else SPENDFUSE_RUN, else a new one.")] = None,
    root_run: Annotated[str | None, typer.Option(help="Root of the tree of runs.")] = None,
    provider: Annotated[str | None, typer.Option(help="Who served the call, such as anthropic.")] = None,
    model: Annotated[str | None, typer.Option(help="The model, as the provider names it.")] = None,
    input_: Annotated[int, typer.Option("--input", min=0, help="Prompt tokens that no cache served.")] = 0,
    output: Annotated[int, typer.Option(min=0, help="Generated tokens, reasoning included.")] = 0,
    cache_read: Annotated[int, typer.Option(min=0, help="Prompt tokens served from a cache.")] = 0,
    cache_write_5m: Annotated[int, typer.Option(min=0, help="Tokens written to a 5-minute cache.")] = 0,
    cache_write_1h: Annotated[int, typer.Option(min=0, help="Tokens written to a 1-hour cache.")] = 0,
    reasoning: Annotated[int, typer.Option(min=0, help="The part of output that was reasoning.")] = 0,
    tier: Annotated[str, typer.Option(help="Service tier.")] = "standard",
    id_: Annotated[str | None, typer.Option("--id", help="Id of the call; new by default. Charged once.")] = None,
    ts: Annotated[str | None, typer.Option(metavar="INSTANT", help="When, RFC 3339; now by default.")] = None,
    kind: Annotated[
        str, typer.Option(help="finished, started (the most it may use) or progress (so far).")
    ] = "finished",
    tag: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A label for reports; may be repeated.")
    ] = None,
    stdin: Annotated[
        bool, typer.Option("--stdin", help="Read a usage, or a pack, as JSON from standard input.")
    ] = False,
    bootstrap_servers: Servers = None,
    state_dir: StateDir = STATE_DIR,
    as_json: Json = False,
) -> None:
    """Emit the usage of one model call, and return once every replica of the broker has it."""
    from spendfuse.cli import console, kafka, target

    where = target.find(bootstrap_servers, state_dir)
    if stdin:
        usages = _from_stdin()
    else:
        usages = [
            _from_options(
                where,
                identity={"workspace": workspace, "team": team, "agent": agent, "run": run, "root_run": root_run},
                call={"provider": provider, "model": model, "tier": tier, "kind": kind, "id": id_, "ts": ts},
                tokens={
                    "input": input_, "output": output, "cache_read": cache_read, "cache_write_5m": cache_write_5m,
                    "cache_write_1h": cache_write_1h, "reasoning": reasoning,
                },
                tags=tag or [],
            )
        ]  # fmt: skip
    placed = kafka.run(_send_all(where, usages))
    if as_json:
        console.data(
            {
                "emitted": len(usages),
                "usages": [one.model_dump(mode="json", exclude_none=True) for one in usages],
                "places": [place._asdict() for place in placed],
            }
        )
        return
    for one in usages:
        console.line(f"{one.id}  {one.agent_path}  {one.provider}/{one.model}  {one.tokens.total:,} tokens")
    where_it_lies = ", ".join(f"{place.partition}@{place.offset}" for place in placed)
    console.note(f"emitted to {where.servers} ({where_it_lies}); see it with `spendfuse status --all`")


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .csv, .tsv, .jsonl or .ndjson file.")],
    preset: Annotated[str | None, typer.Option(help="A known trace: azure-llm-2023, mooncake.")] = None,
    map_: Annotated[
        list[str] | None,
        typer.Option(
            "--map", metavar="FIELD=COLUMN", help="A field's column, or 'literal' in quotes; may be repeated."
        ),
    ] = None,
    mapping: Annotated[Path | None, typer.Option(metavar="FILE", help="The mapping, as YAML or JSON.")] = None,
    start: Annotated[
        str | None, typer.Option(metavar="INSTANT", help="Move the first row to: RFC 3339, `now`, or `2h ago`.")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Stop after so many rows.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and check; send nothing.")] = False,
    bootstrap_servers: Servers = None,
    state_dir: StateDir = STATE_DIR,
    as_json: Json = False,
) -> None:
    """Import usage from a table, in constant memory. Bad rows are reported with their line, and the rest goes on.

    Ids come from the file, or its name and line numbers: importing it again charges nothing twice. A worker refuses
    usage older than 7 days: move an old trace with --start. Exit 1 when a row could not be used.
    """
    from spendfuse.adapters.table import read_table
    from spendfuse.cli import kafka, target

    where = target.find(bootstrap_servers, state_dir)
    chosen = _mapping(preset, map_ or [], mapping, start, where.clock())
    tally = _Tally(where)
    usages = read_table(file, chosen, on_error=tally.error)
    kafka.run(_import(where, usages, tally, rows, dry_run=dry_run, quiet=as_json))
    _report(tally, file, dry_run=dry_run, as_json=as_json)
    raise typer.Exit(1 if tally.bad else 0)


class _Tally:
    """What became of the rows."""

    def __init__(self, where: "Target") -> None:
        from spendfuse.settings import WorkerSettings

        settings = WorkerSettings.from_env(where.env)
        self.sent = self.messages = self.bad = self.old = self.ahead = self.tokens = 0
        self.first_errors: list[RowError] = []
        self._age_max_us = settings.usage_age_max_s * SECOND_US
        self._ahead_max_us = settings.usage_ahead_max_s * SECOND_US
        self._clock = where.clock

    def error(self, error: "RowError") -> None:
        """Count a row that cannot be used."""
        self.bad += 1
        if len(self.first_errors) < ERRORS_KEPT_MAX:
            self.first_errors.append(error)

    def count(self, usages: "Sequence[Usage]") -> None:
        """Count rows that were sent, and those that a worker will refuse."""
        from spendfuse.wire.base import to_us

        now_us = self._clock()
        self.sent += len(usages)
        self.tokens += sum(one.tokens.total for one in usages)
        self.old += sum(now_us - to_us(one.ts) > self._age_max_us for one in usages)
        self.ahead += sum(to_us(one.ts) - now_us > self._ahead_max_us for one in usages)


async def _import(where: "Target", usages: Any, tally: _Tally, rows: int | None, *, dry_run: bool, quiet: bool) -> None:
    import contextlib
    from itertools import islice

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from spendfuse.cli import console, kafka
    from spendfuse.wire.topics import USAGE

    limited = usages if rows is None else islice(usages, rows)
    chunk = list(islice(limited, CHUNK_ROWS))  # a file at fault is said before the broker is asked
    if not dry_run:
        await kafka.check_topics(where, USAGE.name)
    screen = console.err()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=screen, disable=quiet or not screen.is_terminal)
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(progress)
        task = progress.add_task("rows", total=rows)
        send = None if dry_run else await stack.enter_async_context(kafka.sending(where))
        while chunk:
            if send is not None:
                tally.messages += len(await _send_chunk(send, chunk))
            tally.count(chunk)
            progress.update(task, completed=tally.sent)
            chunk = list(islice(limited, CHUNK_ROWS))


async def _send_all(where: "Target", usages: "Sequence[Usage]") -> "list[Placed]":
    from spendfuse.cli import kafka
    from spendfuse.wire.topics import USAGE

    await kafka.check_topics(where, USAGE.name)
    async with kafka.sending(where) as send:
        return await _send_chunk(send, usages)


async def _send_chunk(send: Any, usages: "Sequence[Usage]") -> "list[Placed]":
    """Send usages packed by agent; the packs of one agent one after the other, so that their order holds."""
    import asyncio

    from spendfuse.client.meter import pack
    from spendfuse.wire.topics import USAGE

    by_key: dict[bytes, list[Any]] = {}
    for message in pack(usages):
        by_key.setdefault(message.key, []).append(message)

    async def in_order(messages: list[Any]) -> "list[Placed]":
        return [await send(USAGE.name, message.value, message.key, message.headers) for message in messages]

    return [place for places in await asyncio.gather(*map(in_order, by_key.values())) for place in places]


def _mapping(preset: str | None, items: list[str], mapping: Path | None, start: str | None, now_us: int) -> Any:
    """Return the mapping that the options describe; raises a usage error or TableError."""
    from spendfuse.adapters import table
    from spendfuse.cli.faults import usage_error

    if sum((preset is not None, bool(items), mapping is not None)) != 1:
        raise usage_error(
            "say what the columns are, in one way: --preset NAME, --map FIELD=COLUMN ..., or --mapping FILE"
        )
    first = None if start is None else _instant(start, now_us)
    if preset is not None:
        return table.preset(preset, **({} if first is None else {"start": first}))
    if items:
        return table.parse_map([*items, *([] if first is None else [f"start={first.isoformat()}"])])
    loaded = table.load_mapping(mapping or Path())
    return loaded if first is None else loaded.model_copy(update={"start": first})


def _instant(text: str, now_us: int) -> Any:
    from datetime import datetime

    from spendfuse.cli.faults import usage_error
    from spendfuse.wire.base import from_us

    if text == "now":
        return from_us(now_us)
    if text.endswith(" ago"):
        return from_us(now_us) - duration(text.removesuffix(" ago"))
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise usage_error(f"{text[:40]!r} is no instant: write RFC 3339, now, or such as '2h ago'") from error
    if moment.tzinfo is None:
        raise usage_error(f"{text[:40]!r} has no offset: write {text[:40]}Z for UTC")
    return moment


def _report(tally: _Tally, file: Path, *, dry_run: bool, as_json: bool) -> None:
    from spendfuse.cli import console

    if as_json:
        console.data(
            {
                "file": str(file), "dry_run": dry_run, "usages": tally.sent, "messages": tally.messages,
                "tokens": tally.tokens, "bad_rows": tally.bad, "too_old": tally.old, "in_the_future": tally.ahead,
                "errors": [error._asdict() for error in tally.first_errors],
            }
        )  # fmt: skip
        return
    for error in tally.first_errors[:ERRORS_SHOWN_MAX]:
        console.note(f"{file}:{error.row}: {error.reason}", "yellow")
    if tally.bad > ERRORS_SHOWN_MAX:
        console.note(f"and {tally.bad - ERRORS_SHOWN_MAX:,} more bad rows", "yellow")
    verb = "read" if dry_run else "emitted"
    console.line(f"{tally.sent:,} usages {verb}, {tally.tokens:,} tokens, {tally.bad:,} bad rows")
    for count, why in ((tally.old, "are older than a worker takes"), (tally.ahead, "lie in the future")):
        if count:
            console.note(f"{count:,} of them {why}, and go to the dead letters: move the file with --start", "yellow")


def _from_stdin() -> "list[Usage]":
    import sys

    from pydantic import ValidationError

    from spendfuse.cli.faults import usage_error
    from spendfuse.wire.usage import decode_usages

    raw = sys.stdin.buffer.read(STDIN_BYTES_MAX + 1)
    if len(raw) > STDIN_BYTES_MAX:
        raise usage_error(f"standard input holds more than {STDIN_BYTES_MAX:,} bytes: use `spendfuse usage import`")
    try:
        return decode_usages(raw)
    except ValidationError as error:
        raise usage_error(f"standard input is no usage: {_faults(error)}") from error


def _from_options(
    where: "Target", *, identity: dict[str, str | None], call: dict[str, Any], tokens: dict[str, int], tags: list[str]
) -> "Usage":
    """Return the usage that the options describe; raises a usage error with all faults."""
    import uuid

    from pydantic import ValidationError

    from spendfuse.cli.faults import usage_error
    from spendfuse.settings import PREFIX
    from spendfuse.wire.usage import Usage

    said = {name: value or where.env.get(PREFIX + name.upper()) for name, value in identity.items()}
    wanted = {**said, "provider": call["provider"], "model": call["model"]}
    missing = [f"--{name}" for name in ("workspace", "team", "agent", "provider", "model") if not wanted[name]]
    if missing:
        raise usage_error(f"missing: {', '.join(missing)} (or give the usage as JSON with --stdin)")
    if not any(tokens.values()):
        raise usage_error("a usage without tokens: give --input, --output, or a cache counter")
    pairs = [item.partition("=") for item in tags]
    if wrong := [item for item, (_, equals, _value) in zip(tags, pairs, strict=True) if not equals]:
        raise usage_error(f"{wrong[0][:80]!r} is no tag: write name=value")
    now_us = where.clock()
    fields: dict[str, Any] = {
        **{name: value for name, value in (said | call).items() if value is not None},
        "run": said["run"] or f"run-{uuid.uuid4().hex}",
        "id": call["id"] or f"cli:{uuid.uuid4().hex}",
        "ts": _instant(call["ts"] or "now", now_us),
        "tokens": tokens,
        "source": "spendfuse-cli",
        "tags": {name: value for name, _, value in pairs},
    }
    try:
        return Usage.model_validate(fields)
    except ValidationError as error:
        raise usage_error(_faults(error)) from error


def _faults(error: Any) -> str:
    faults = error.errors(include_input=False, include_url=False, include_context=False)
    return "; ".join(f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in faults[:10])
