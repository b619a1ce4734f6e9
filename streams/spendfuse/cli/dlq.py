"""`spendfuse dlq`: what was refused, why, and once more."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from spendfuse.cli.operator_entry import Whoever
from spendfuse.cli.options import STATE_DIR, Json, Servers, StateDir, command, duration, examples

if TYPE_CHECKING:
    from spendfuse.cli.target import Target
    from spendfuse.client.follow import Record
    from spendfuse.pipeline.dead_letters import Filter, Letter

REPLAY_MAX: Final = 10_000
"""Most letters of one replay."""
REPLAY_BYTES_MAX: Final = 64 * 1_048_576
"""Most bytes of them: all are held, so that nothing is sent before everything was read."""
SHOWN_BYTES: Final = 4_096
PREVIEW_BYTES: Final = 60
US_PER_MS: Final = 1_000
NS_PER_MS: Final = 1_000_000

dlq = typer.Typer(
    help="Dead letters: what was refused, and why.",
    no_args_is_help=True,
    epilog=examples("spendfuse dlq list", "spendfuse dlq replay --help"),
)

Reason = Annotated[str, typer.Option(metavar="TEXT", help="Only with this in the reason, in any case.")]
OriginTopic = Annotated[str, typer.Option(metavar="TOPIC", help="Only refused records of this topic.")]
Since = Annotated[str | None, typer.Option(metavar="LENGTH", help="Only of the last 30m, 2h, 1d ...")]
Until = Annotated[str | None, typer.Option(metavar="LENGTH", help="Only older than 30m, 2h, 1d ...")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(
        dlq,
        list_,
        "spendfuse dlq list",
        "spendfuse dlq list --reason 'older than' --since 1d",
        "spendfuse dlq list --topic spendfuse.usage.v1 --json",
        name="list",
    )
    command(dlq, show, "spendfuse dlq show 17", "spendfuse dlq show 17 --raw refused.bin")
    command(
        dlq,
        replay,
        "spendfuse dlq replay 17 18",
        "spendfuse dlq replay --reason 'older than' --since 1d --dry-run",
        "spendfuse dlq replay --all",
    )
    app.add_typer(dlq, name="dlq")


def list_(
    reason: Reason = "",
    topic: OriginTopic = "",
    since: Since = None,
    until: Until = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000, help="Show so many, the newest.")] = 50,
    bootstrap_servers: Servers = None,
    state_dir: StateDir = STATE_DIR,
    as_json: Json = False,
) -> None:
    """List dead letters, the newest last: offset, when, where the record lies, the reason, and its first bytes."""
    from collections import deque

    from spendfuse.cli import console, target
    from spendfuse.pipeline.dead_letters import escaped, row

    where = target.find(bootstrap_servers, state_dir)
    newest: deque[Letter] = deque(maxlen=limit)
    count = 0

    def take(letter: "Letter") -> None:
        nonlocal count
        count += 1
        newest.append(letter._replace(value=letter.value if as_json else letter.value[:PREVIEW_BYTES]))

    _read(where, _filter(reason, topic, since, until), take)
    if as_json:
        console.data({"count": count, "letters": [row(letter) for letter in newest]})
        return
    if not newest:
        console.note("no dead letter is like that" if reason or topic or since or until else "no dead letters")
        return
    console.table(
        ["offset", "when", "origin", "reason", "bytes"],
        [
            [
                str(letter.offset), _instant(letter.timestamp_ms), letter.origin, letter.reason,
                escaped(letter.value, PREVIEW_BYTES),
            ]
            for letter in newest
        ],
        right=["offset"],
    )  # fmt: skip
    console.note(f"{len(newest):,} of {count:,}; see one with `spendfuse dlq show {newest[-1].offset}`")


def show(
    offset: Annotated[int, typer.Argument(min=0, help="Its offset, as `spendfuse dlq list` says.")],
    raw: Annotated[Path | None, typer.Option(metavar="FILE", help="Write its bytes, as they came, to a file.")] = None,
    bootstrap_servers: Servers = None,
    state_dir: StateDir = STATE_DIR,
    as_json: Json = False,
) -> None:
    """Show one dead letter: its headers and its bytes. What a terminal might obey is shown escaped, never written."""
    import base64

    from spendfuse.cli import console, target
    from spendfuse.pipeline.dead_letters import Filter, escaped, row

    where = target.find(bootstrap_servers, state_dir)
    found: list[Letter] = []
    _read(where, Filter(offsets=frozenset({offset})), found.append)
    if not found:
        raise _no_letter([offset])
    letter = found[0]
    if raw is not None:
        raw.write_bytes(letter.value)
        console.note(f"{len(letter.value):,} bytes written to {raw}")
    if as_json:
        headers = [[name, base64.b64encode(value or b"").decode()] for name, value in letter.headers]
        console.data(
            {**row(letter), "headers_base64": headers, "value_base64": base64.b64encode(letter.value).decode()}
        )
        return
    console.line(f"offset     {letter.offset}")
    console.line(f"when       {_instant(letter.timestamp_ms)}")
    console.line(f"origin     {letter.origin}, place {letter.nth}")
    console.line(f"reason     {letter.reason}")
    for name, value in letter.headers:
        console.line(f"header     {escaped(name.encode(), SHOWN_BYTES)}: {escaped(value or b'', SHOWN_BYTES)}")
    console.line(f"bytes      {len(letter.value):,}")
    console.line(escaped(letter.value, SHOWN_BYTES))
    if len(letter.value) > SHOWN_BYTES:
        console.note(f"and {len(letter.value) - SHOWN_BYTES:,} bytes more: `spendfuse dlq show {offset} --raw FILE`")


def replay(
    offsets: Annotated[
        list[int] | None, typer.Argument(metavar="[OFFSET]...", min=0, help="Those letters; none: those that match.")
    ] = None,
    reason: Reason = "",
    topic: OriginTopic = "",
    since: Since = None,
    until: Until = None,
    all_: Annotated[bool, typer.Option("--all", help="Every letter there is.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also what did not come from spendfuse.usage.v1.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent; send nothing.")] = False,
    by: Whoever = "",
    why: Annotated[str, typer.Option(metavar="TEXT", help="Why; the ledger keeps it.")] = "",
    bootstrap_servers: Servers = None,
    state_dir: StateDir = STATE_DIR,
    as_json: Json = False,
) -> None:
    """Offer refused records again, byte for byte, on the topic they came from, marked with a header.

    For when the reason has gone: a worker that knows more, a clock set right. A usage that was charged meanwhile is
    a duplicate by its id, and not charged again; one that is still at fault becomes another dead letter. Exit 1 when
    a letter could not be replayed. The ledger gets an entry of it first.
    """
    from spendfuse.cli import console, kafka, operator_entry, target
    from spendfuse.cli.faults import EXIT_FAILED, usage_error
    from spendfuse.pipeline.dead_letters import row, why_not

    if not (offsets or reason or topic or since or until or all_):
        raise usage_error("say which dead letters: their offsets, --reason, --topic, --since, --until, or --all")
    by = operator_entry.named(by, why)
    where = target.find(bootstrap_servers, state_dir)
    chosen = _filter(reason, topic, since, until)._replace(offsets=frozenset(offsets or []))
    letters = _held(where, chosen)
    if missing := sorted(set(offsets or []) - {letter.offset for letter in letters}):
        raise _no_letter(missing)
    kept = [(letter, why_not(letter, force=force)) for letter in letters]
    good = [letter for letter, fault in kept if fault is None]
    placed = {} if dry_run or not good else kafka.run(_send(where, good, by, why))
    if as_json:
        rows = [
            {**row(letter), "refused": fault, "placed": placed.get(letter.offset)} for letter, fault in kept
        ]  # fmt: skip
        console.data({"replayed": len(placed), "dry_run": dry_run, "letters": rows})
    else:
        for letter, fault in kept:
            if fault is not None:
                console.note(f"{letter.offset} is not replayed: {fault}", "yellow")
            else:
                to = "would go" if dry_run else f"now at {placed[letter.offset]}, from"
                console.line(f"{letter.offset}  {to} {'to ' + letter.topic if dry_run else letter.origin}")
        console.note(f"{len(good):,} {'to replay' if dry_run else 'replayed'}, {len(kept) - len(good):,} not")
    raise typer.Exit(EXIT_FAILED if len(good) < len(kept) else 0)


def _held(where: "Target", chosen: "Filter") -> "list[Letter]":
    """Return the letters chosen; raises CliError when they are too many for one replay."""
    from spendfuse.cli.faults import CliError

    letters: list[Letter] = []
    count = size = 0

    def take(letter: "Letter") -> None:
        nonlocal count, size
        count += 1
        size += len(letter.value)
        if count <= REPLAY_MAX and size <= REPLAY_BYTES_MAX:
            letters.append(letter)

    _read(where, chosen, take)
    if len(letters) < count:
        raise CliError(
            f"{count:,} dead letters of {size:,} bytes: one replay takes {REPLAY_MAX:,} "
            f"and {REPLAY_BYTES_MAX:,} bytes. Narrow it with --since, --until or --reason"
        )
    return letters


async def _send(where: "Target", letters: "list[Letter]", by: str, why: str) -> dict[int, str]:
    from spendfuse.cli import kafka, operator_entry
    from spendfuse.cli.faults import CliError
    from spendfuse.pipeline.dead_letters import replay_of

    counts = await kafka.check_topics(where, *{letter.topic for letter in letters})
    for letter in letters:
        to = replay_of(letter)
        if to.partition is not None and to.partition >= counts[to.topic]:  # its header may say anything
            raise CliError(
                f"dead letter {letter.offset} came from {letter.origin}, and there are {counts[to.topic]} partitions"
            )
    placed = {}
    about = {"letters": len(letters), "offsets": operator_entry.some([letter.offset for letter in letters])}
    await operator_entry.send_as(where, "replay dead letters", about, by, why)
    async with kafka.sending(where) as send:
        for letter in letters:  # one after the other: their order is part of what they were
            again = replay_of(letter)
            at = await send(again.topic, again.value, None, again.headers, again.partition)
            placed[letter.offset] = f"{again.topic}/{at.partition}/{at.offset}"
    return placed


def _read(where: "Target", chosen: "Filter", take: Any) -> None:
    from spendfuse.cli import kafka
    from spendfuse.pipeline.dead_letters import read_letter
    from spendfuse.wire.topics import DEAD_LETTERS

    def on_record(record: "Record") -> None:
        letter = read_letter(record)
        if chosen.takes(letter):
            take(letter)

    async def read() -> None:
        await kafka.check_topics(where, DEAD_LETTERS.name)
        await kafka.read_to_end(where, {DEAD_LETTERS.name: on_record})

    kafka.run(read())


def _filter(reason: str, topic: str, since: str | None, until: str | None) -> "Filter":
    import time  # the wall's: the deployment's clock may be scaled, and Kafka's stamps are not

    from spendfuse.pipeline.dead_letters import Filter

    now_ms = time.time_ns() // NS_PER_MS

    def ago(text: str | None) -> int | None:
        return None if text is None else now_ms - int(duration(text).total_seconds()) * US_PER_MS

    return Filter(reason, topic, ago(since), ago(until))


def _no_letter(offsets: list[int]) -> Exception:
    from spendfuse.cli.faults import CliError

    said = ", ".join(map(str, offsets[:10]))
    return CliError(f"there is no dead letter at offset {said}: see `spendfuse dlq list`; they are kept for 30 days")


def _instant(timestamp_ms: int) -> str:
    from spendfuse.wire.base import from_us

    try:
        return f"{from_us(timestamp_ms * US_PER_MS):%Y-%m-%dT%H:%M:%SZ}"
    except (OverflowError, ValueError):  # its producer chose it
        return str(timestamp_ms)
