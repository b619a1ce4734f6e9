"""What a rebuild reads: the ledger topic's messages, or the trail's rows; both become charges and commands."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, Protocol

import msgspec
from pydantic import ValidationError

from spendfuse.audit.queries import load
from spendfuse.engine.rebuilt import NO_OFFSET, Charged, Rebuilt
from spendfuse.pipeline.records import Headers
from spendfuse.wire.base import from_us, to_us
from spendfuse.wire.control import Cause, Command, CommandWindow, Degrade, Measure
from spendfuse.wire.packed import Origin

SLICE_ROWS: Final = 50_000
"""Rows of one query: some 10 MB, far below what the endpoint gives."""
COMMANDS_MAX: Final = 100_000
"""Most caps whose latest command is taken over; `commands.v1` keeps as many as there are keys."""


class _Tokens(msgspec.Struct):
    input: int = 0
    cache_read: int = 0
    cache_write_5m: int = 0
    cache_write_1h: int = 0
    output: int = 0


class _Usage(msgspec.Struct):
    id: str
    ts: datetime
    workspace: str
    team: str
    agent: str
    run: str
    tokens: _Tokens
    root_run: str | None = None


class _Correction(msgspec.Struct):
    id: str
    ts: datetime
    at: datetime
    workspace: str
    team: str
    agent: str
    run: str
    tokens: _Tokens
    cost_nanos: int
    root_run: str | None = None


class _Charge(msgspec.Struct):
    cost_nanos: int


class _Entry(msgspec.Struct):
    """As much of a ledger entry as matters; the whole of it is `wire.ledger`'s, and was validated when it was made."""

    kind: str
    partition: int
    offset: int
    at: datetime
    index: int = 0
    usage: _Usage | None = None
    charge: _Charge | None = None
    correction: _Correction | None = None
    command: msgspec.Raw = msgspec.Raw(b"")


class _Batch(msgspec.Struct):
    entries: list[_Entry]


_batches: Final = msgspec.json.Decoder(_Batch)


class TrailReader(Protocol):
    """What a ClickHouse client does here."""

    def query(self, query: str, parameters: dict[str, Any]) -> Any:
        """Run a query; the result has `result_rows`."""
        ...


def fold_ledger(value: bytes | None, headers: Headers, rebuilt: Rebuilt) -> bool:
    """Fold one message of `ledger.v1`; False for one that nobody can read, which changes nothing."""
    try:
        entries = _batches.decode(value or b"").entries
        commands = [Command.model_validate_json(bytes(entry.command)) for entry in entries if len(entry.command)]
    except (msgspec.DecodeError, ValidationError):
        return False
    as_of = _packed_offset(headers)
    following = iter(commands)
    for entry in entries:
        command = next(following) if len(entry.command) else None
        if entry.kind == "charge" and entry.usage is not None and entry.charge is not None:
            rebuilt.charge(_charged(entry, entry.usage, entry.charge.cost_nanos, as_of))
        elif entry.kind == "correction" and entry.correction is not None:
            rebuilt.charge(_charged(entry, entry.correction, entry.correction.cost_nanos, as_of))
        elif command is not None and entry.kind in {"command", "decision"}:
            rebuilt.command(command, sent=entry.kind == "command")
    return True


def _packed_offset(headers: Headers) -> int:
    """Return the offset of the packed message that a ledger message's charges came with: its id is partition/offset."""
    name = next((said for key, said in reversed(headers) if key == "ce_id"), None) or b""
    partition, _, offset = name.partition(b"/")
    return int(offset) if partition.isdigit() and offset.isdigit() else NO_OFFSET


def _charged(entry: _Entry, of: _Usage | _Correction, nanos: int, as_of: int) -> Charged:
    tokens = of.tokens
    return Charged(
        workspace=of.workspace,
        team=of.team,
        agent=of.agent,
        root_run=of.root_run or of.run,
        call_id=of.id,
        ts_us=to_us(of.ts),
        at_us=to_us(entry.at),
        nanos=nanos,
        tokens=tokens.input + tokens.cache_read + tokens.cache_write_5m + tokens.cache_write_1h + tokens.output,
        origin=Origin(entry.partition, entry.offset, entry.index),
        as_of=as_of,
        stated_us=to_us(of.at) if isinstance(of, _Correction) else None,
    )


def last_batches(client: TrailReader) -> dict[int, int]:
    """Return the last whole batch of each ledger partition that the trail has."""
    rows = client.query(load("state_batches"), {}).result_rows
    return {int(partition): int(seq) for partition, seq in rows}


def fold_trail(
    client: TrailReader,
    rebuilt: Rebuilt,
    former: Mapping[int, int],
    former_us: int,
    progress: Callable[[int, int], None],
) -> None:
    """Fold the trail's charges of another Kafka: of whole batches up to `former`, or recorded before `former_us`.

    `progress` is told the rows read and all there are. Blocking.
    """
    cut = client.query(load("state_slices"), {"slice_rows": SLICE_ROWS}).result_rows
    slices = [tuple(int(part) for part in row) for row in cut]
    total, done = sum(rows for *_, rows in slices), 0
    progress(0, total)
    for partition, seq_from, seq_to, rows in slices:
        bounds = {"former_seq": former.get(partition, 0), "former": from_us(former_us)}
        for row in _pages(client, {"partition": partition, "seq_from": seq_from, "seq_to": seq_to, **bounds}):
            space, team, agent, run, call_id, ts_us, at_us, nanos, tokens = row[:9]
            charged = Charged(space, team, agent, run, call_id, int(ts_us), int(at_us), int(nanos), int(tokens))
            stated_us = int(row[12])  # 0: no correction
            rebuilt.charge(charged._replace(stated_us=stated_us) if stated_us else charged)
        done += rows
        progress(done, total)


def _pages(client: TrailReader, where: dict[str, Any]) -> Iterator[Sequence[Any]]:
    """Yield the charges of some batches in the order of the ledger, however many one batch holds."""
    after = (0, 0, 0)
    while True:
        last = dict(zip(("after_seq", "after_offset", "after_row"), after, strict=True))
        parameters = {**where, **last, "first": int(after == (0, 0, 0)), "rows_max": SLICE_ROWS}
        rows = client.query(load("state_charges"), parameters).result_rows
        yield from rows
        if len(rows) < SLICE_ROWS:
            return
        seq, offset, place = rows[-1][9:12]
        after = (int(seq), int(offset), int(place))


def trail_commands(client: TrailReader, since_us: int) -> list[tuple[Command, bool]]:
    """Return the latest command of each scope, budget and cap issued since an instant; and whether it was sent."""
    rows = client.query(load("state_commands"), {"since": from_us(since_us), "commands_max": COMMANDS_MAX}).result_rows
    found = []
    for row in rows:
        each = dict(zip(_COMMAND_COLUMNS, row, strict=True))
        found.append((_command(each), not each["decided_only"]))
    return found


_COMMAND_COLUMNS: Final = (
    "command_id", "decided_only", "seq", "action", "scope", "budget", "cap", "budget_version", "issued_at",
    "expires_at", "window_kind", "window_label", "window_timezone", "window_start", "window_end", "unit", "cap_amount",
    "spend", "committed", "fraction_bp", "cause_usage_id", "cause_ts", "cause_partition", "cause_offset",
    "cause_produced_at_ms", "degrade_models", "degrade_max_output_tokens", "price_book", "issued_by", "reason",
    "message",
)  # fmt: skip


def _command(row: Mapping[str, Any]) -> Command:
    """Return the command that a row is of; times come as microseconds, 0 for none."""

    def instant(name: str) -> datetime | None:
        return from_us(int(row[name])) if row[name] else None

    window = measure = cause = degrade = None
    if row["window_kind"]:
        window = CommandWindow(
            kind=row["window_kind"], label=row["window_label"], timezone=row["window_timezone"],
            start=instant("window_start"), end=instant("window_end"),
        )  # fmt: skip
    if row["unit"]:
        measure = Measure(
            unit=row["unit"], cap=int(row["cap_amount"]), spend=int(row["spend"]), committed=int(row["committed"]),
            fraction=int(row["fraction_bp"]),
        )  # fmt: skip
    if row["cause_usage_id"]:
        cause = Cause(
            usage_id=row["cause_usage_id"], ts=from_us(int(row["cause_ts"])), partition=int(row["cause_partition"]),
            offset=int(row["cause_offset"]), produced_at_ms=int(row["cause_produced_at_ms"]),
        )  # fmt: skip
    if row["action"] == "degrade":
        longest = row["degrade_max_output_tokens"]
        degrade = Degrade(models=dict(row["degrade_models"]), max_output_tokens=int(longest) if longest else None)
    return Command(
        id=row["command_id"], seq=int(row["seq"]), action=row["action"], scope=row["scope"], budget=row["budget"],
        cap=row["cap"], budget_version=int(row["budget_version"]), issued_at=from_us(int(row["issued_at"])),
        expires_at=instant("expires_at"), window=window, measure=measure, cause=cause, degrade=degrade,
        price_book=row["price_book"], by=row["issued_by"], reason=row["reason"], message=row["message"],
    )  # fmt: skip
