"""What reads bytes that others wrote, and what must hold for any bytes: a refusal in its own words, and nothing lost.

A target takes the seeds' changed bytes and returns whether they were taken; anything it raises is a defect. What it
compares with is read by the standard library's JSON, never by the product.
"""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pydantic import BaseModel, ValidationError

from pipeline.samples import BOOK, budget, call, cap, driver
from spendfuse.adapters import budget_file, price_book_file
from spendfuse.audit import batches, rows
from spendfuse.client.accept import Refused, accept, accept_remaining
from spendfuse.client.follow import Record
from spendfuse.client.keys import Verifier, generate, parse_public_keys
from spendfuse.engine.ids import SeenIds
from spendfuse.engine.policies import Policies
from spendfuse.engine.prices import PriceBook
from spendfuse.pipeline import recorder
from spendfuse.pipeline.codec import UnreadableStateError, decode_scope, decode_shared, encode_scope, encode_shared
from spendfuse.pipeline.feed import decode_budget, decode_price
from spendfuse.pipeline.intake import Limits, rounds
from spendfuse.pipeline.records import SourceRecord
from spendfuse.pipeline.register import Register
from spendfuse.pipeline.rollup import _is_plausible
from spendfuse.wire import Budget, PriceOverride, encode
from spendfuse.wire.control import Ack, Alert, Heartbeat
from spendfuse.wire.ledger import LedgerBatch
from spendfuse.wire.packed import Packed
from spendfuse.wire.rollup import Rollup
from spendfuse.wire.topics import ALERTS, BUDGETS, COMMANDS, LEDGER, PACKED, PRICES, REMAINING, ROLLUPS, USAGE
from spendfuse.wire.usage import decode_usages
from workers import ROOT

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

PARTITIONS: Final = 4
LIMITS: Final = Limits(7 * 86_400_000_000, 300_000_000)
EXAMPLES: Final = ROOT / "schemas" / "examples"
BUDGET_YAML: Final = """\
version: 1
workspaces:
  acme: {timezone: Europe/Amsterdam}
budgets:
  - id: agents
    scope: agent:acme/*/*
    note: one of each
    caps:
      - {id: day, amount: 5.50 USD, window: day, warn: [50%], degrade: {at: 80%, models: {opus: claude}}}
      - {id: rolling, amount: 2_500M tokens, window: rolling 90m}
  - id: all
    scope: workspace:acme
    shadow: true
    caps: [{id: month, amount: 100 USD, window: month}]
"""
DEEP: Final = (b"[" * 20_000, b'{"usages":' + b"[" * 9_000 + b"]" * 9_000 + b"}", b'{"a":' * 5_000)


class Target(NamedTuple):
    """A reader of bytes, what it is tried on, and what it does with a batch of inputs: how many were taken."""

    name: str
    seeds: Sequence[bytes]
    check: Callable[[random.Random, Sequence[bytes]], int]
    share: int


class DefectError(AssertionError):
    """Something did not hold; the message says for which bytes."""


def _must(holds: object, what: str, value: object) -> None:
    if not holds:
        raise DefectError(f"{what}: {value!r}"[:2_000])


def _each(read: Callable[[bytes], Any], *refusals: type[Exception]) -> Callable[[random.Random, Sequence[bytes]], int]:
    """Return a check that reads each input, where only these refusals are allowed; they must say something."""

    def check(_: random.Random, values: Sequence[bytes]) -> int:
        taken = 0
        for value in values:
            try:
                read(value)
            except refusals as refusal:
                _must(str(refusal), "a refusal without words", value)
            else:
                taken += 1
        return taken

    return check


def _usages(value: bytes) -> None:
    usages = decode_usages(value)
    _must(1 <= len(usages) <= 500, "so many usages", value)
    for usage in usages:
        _must(decode_usages(encode(usage)) == [usage], "read differently when written again", value)


def _model(kind: type[BaseModel]) -> Callable[[bytes], None]:
    def read(value: bytes) -> None:
        message = kind.model_validate_json(value)
        again = kind.model_validate_json(message.model_dump_json(exclude_none=True))
        _must(again == message, "read differently when written again", value)

    return read


def _rollup(value: bytes) -> None:
    _is_plausible(Rollup.model_validate_json(value), value)


def _intake(chance: random.Random, values: Sequence[bytes]) -> int:
    """Every usage of every record comes out once, packed or as a dead letter, with what it said."""
    records = [
        SourceRecord(
            USAGE.name, chance.randrange(3), offset, chance.choice((-1, 0, NOW_US // 1_000, 2**63 - 1)), None, value
        )
        for offset, value in enumerate(values)
    ]
    out: dict[int, list[int]] = defaultdict(list)
    whole: set[int] = set()
    homes: dict[str, int] = {}
    taken = 0
    for each in rounds(records, PARTITIONS, LIMITS, NOW_US):
        _must(set(each.packed) <= set(range(PARTITIONS)), "a partition that is not", sorted(each.packed))
        packed = 0
        for partition, body in each.packed.items():
            usages = json.loads(body)["usages"]
            packed += len(usages)
            _must(Packed.model_validate_json(body).usages, "the meter cannot read it", body)
            for one in usages:
                record = records[one["o"]]
                _must(one["p"] == record.partition, "another partition than it came from", record)
                path = f"{one['u']['workspace']}/{one['u']['team']}/{one['u']['agent']}"
                _must(homes.setdefault(path, partition) == partition, "one agent on two partitions", path)
                _as_said(record.value or b"", one["i"], one["u"])
                out[one["o"]].append(one["i"])
        _must(packed == each.usages, "the count of usages", each)
        taken += packed
        for dead in each.dead:
            _must(dead.reason and len(dead.reason) <= 1_000, "the reason of a dead letter", dead)
            out[dead.record.offset].append(dead.nth)
            if dead.value is None:
                whole.add(dead.record.offset)
    for offset, value in enumerate(values):
        found = out[offset]
        _must(sorted(found) == list(range(len(found))) and found, "not each usage once", (value, found))
        items = _items(value)
        expected = {1} if items is None or offset in whole else {len(items)}
        _must(len(found) in expected or (items is None and _unread(value)), "so many came out", (value, found))
    return taken


def _parsed(value: bytes) -> Any:
    return json.loads(value[5:] if value[:1] == b"\0" else value)


def _unread(value: bytes) -> bool:
    try:
        _parsed(value)
    except (ValueError, RecursionError):
        return True
    return False


def _items(value: bytes) -> list[Any] | None:
    """Return the items of a pack; None for what is one usage, or nothing that JSON is."""
    if _unread(value):
        return None
    message = _parsed(value)
    items = message.get("usages") if isinstance(message, dict) else None
    return items if isinstance(items, list) and items else None


def _as_said(value: bytes, nth: int, usage: dict[str, Any]) -> None:
    """Hold what was taken in against what the emitter wrote."""
    if _unread(value):
        return
    items = _items(value)
    said = items[nth] if items else _parsed(value)
    for name in ("id", "workspace", "team", "agent", "run", "provider", "model"):
        _must(usage[name] == said[name], f"{name} changed on the way", value)
    tokens = {name: count for name, count in usage["tokens"].items() if count}
    _must(tokens == {name: count for name, count in said["tokens"].items() if count}, "tokens changed", value)
    _must(all(type(count) is int for count in said["tokens"].values()), "a counter that is no integer", value)


def _audit(value: bytes) -> None:
    """The audit keeps every entry: as a row, or as bytes that it could not read."""
    place = rows.Place(LEDGER.name, 0, 1, -1)
    facts = batches._decode(batches.Message(1, -1, value)).facts
    entries = None if _unread(value) else _parsed(value)
    entries = entries.get("entries") if isinstance(entries, dict) else None
    _must(len(facts) in {1, len(entries) if isinstance(entries, list) else 1}, "so many facts", value)
    for fact in facts:
        with contextlib.suppress(rows.UnfitError):
            row = rows.entry_row(fact.entry, place) if fact.entry else rows.unreadable_row(fact.raw, fact.reason, place)
            _must(row, "no row", value)
    if any(fact.entry is None for fact in facts):
        raise ValueError("refused: kept as bytes")


def _slot(value: bytes) -> None:
    SeenIds().restore(value)


def _states(decode: Callable[[bytes], Any], write: Callable[[Any], bytes]) -> Callable[[bytes], None]:
    def read(value: bytes) -> None:
        state = decode(value)
        _must(decode(write(state)) == state, "read differently when written again", value)

    return read


def _guard(chance: random.Random, values: Sequence[bytes]) -> int:
    """A guard obeys what was signed, byte for byte, and nothing else."""
    signed = SIGNED.choice(chance)
    taken = 0
    for value in values:
        record = signed._replace(value=value)
        read = accept if record.topic == COMMANDS.name else accept_remaining
        try:
            read(record, VERIFIER, unsigned=False)
        except Refused as refused:
            _must(value != signed.value, "a genuine command refused", refused)
        else:
            taken += 1
            _must(value == signed.value, "obeyed, and nobody signed it", value)
        with contextlib.suppress(Refused):  # past the signature, as where commands go unsigned
            read(record._replace(headers=()), None, unsigned=True)
    return taken


def _recorder(chance: random.Random, values: Sequence[bytes]) -> int:
    register = Register(VERIFIER)
    taken = 0
    for offset, value in enumerate(values):
        topic = chance.choice(recorder.RECORDED).name
        headers = (("spendfuse-reason", chance.choice(values)[:90]), ("spendfuse-sig", chance.choice(values)[:90]))
        source = SourceRecord(topic, 0, offset, -1, chance.choice(values)[:60], value, headers=headers)
        entry, fault = recorder.ledger_entry(source, NOW_US, register)
        _must(entry is not None or fault, "neither recorded nor refused, with the reason", source)
        taken += entry is not None
        if entry is not None:
            _must(LedgerBatch(entries=[entry]).model_dump_json(), "an entry that cannot be written", source)
    return taken


class _Signed:
    """Signed records of the commands and of what remains."""

    def __init__(self, records: Sequence[SourceRecord]) -> None:
        self.records = [Record(*record[:6], tuple(record.headers)) for record in records]

    def choice(self, chance: random.Random) -> Record:
        return chance.choice(self.records)


PRIVATE, PUBLIC = generate("fuzz")
VERIFIER: Final = Verifier.parse(PUBLIC)
_SOURCE: Final = driver(
    budget("agent:acme/*/*", cap(5, warn=[5_000]), name="agents"),
    budget("team:acme/*", cap(5, window="month"), name="teams"),
    signing_key=PRIVATE,
)
NOW_US: Final = _SOURCE.now_us
_SOURCE.emit([call(_SOURCE, input=5, tags={"k": "v"}), call(_SOURCE, "acme/sales/b", output=1, cache_read=3)])
_SOURCE.emit(call(_SOURCE, input=7, root_run="root", workflow="w", tier="batch"))
_SOURCE.emit(call(_SOURCE, kind="started", deadline=_SOURCE.now, input=7))
_SOURCE.price(PriceOverride(id="p1", row=BOOK.rows[0]))
SIGNED: Final = _Signed([*_SOURCE.records(COMMANDS.name), *_SOURCE.records(REMAINING.name)])


def _written(topic: str) -> list[bytes]:
    found = [record.value for record in _SOURCE.records(topic) if record.value]
    return found or [b"{}"]


def _examples(prefix: str) -> list[bytes]:
    return [
        path.read_bytes() for folder in ("valid", "invalid") for path in sorted((EXAMPLES / folder).glob(f"{prefix}*"))
    ]


def _states_of(table: str) -> list[bytes]:
    return [record.value for record in _SOURCE.changelog if record.table == table]


def _own_key(value: bytes) -> bytes:
    """Return the key that a record of this content should have, so that it is not refused for that alone."""
    try:
        message = json.loads(value)
        return str(message.get("id") or f"workspace/{message.get('workspace')}").encode("utf-8", "replace")
    except (ValueError, AttributeError, RecursionError):
        return b"k"


def _budget(value: bytes) -> None:
    record = decode_budget(_own_key(value), value)
    Policies([record] if isinstance(record, Budget) else [], []).of("agent:acme/research/planner")


def _price(value: bytes) -> None:
    PriceBook.compile(BOOK, [decode_price(_own_key(value), value)])


_HALT: Final = _SOURCE.commands()[0]
_ACK: Final = Ack(command_id=_HALT.id, seq=_HALT.seq, scope=_HALT.scope, budget=_HALT.budget, cap=_HALT.cap,
                  agent="agent:acme/research/planner", guard="g1", state="enforced", at=_SOURCE.now)  # fmt: skip
_BEAT: Final = Heartbeat(emitter="spendfuse/host/1", ts=_SOURCE.now, ready=True, version="0.1", lag=3, stale=True)
_RECORDED: Final = [value for topic in (COMMANDS, BUDGETS, ALERTS) for value in _written(topic.name)]
_PREFIXED: Final = [b"\0\0\0\0\7" + value for value in _written(USAGE.name)]
_USAGE_SEEDS: Final = [*_written(USAGE.name), *_PREFIXED, *_examples("usage"), *DEEP]
TARGETS: Final = [
    Target("usage", _USAGE_SEEDS, _each(_usages, ValidationError), 20),
    Target("intake", [*_written(USAGE.name) * 4, *_USAGE_SEEDS], _intake, 40),
    Target("packed", _written(PACKED.name), _each(_model(Packed), ValidationError), 6),
    Target("rollup", _written(ROLLUPS.name), _each(_rollup, ValidationError), 6),
    Target("budget", [*_written(BUDGETS.name), *_examples("budget")], _each(_budget, ValueError), 4),
    Target("price", _written(PRICES.name), _each(_price, ValueError), 2),
    Target("ledger", _written(LEDGER.name), _each(LedgerBatch.model_validate_json, ValidationError), 4),
    Target("audit", _written(LEDGER.name), _each(_audit, ValueError), 4),
    Target("ack", [encode(_ACK)], _each(_model(Ack), ValidationError), 1),
    Target("alert", _written(ALERTS.name), _each(_model(Alert), ValidationError), 1),
    Target("heartbeat", [encode(_BEAT)], _each(_model(Heartbeat), ValidationError), 1),
    Target("guard", [*_written(COMMANDS.name), *_written(REMAINING.name)], _guard, 4),
    Target("recorder", [*_RECORDED, encode(_ACK)], _recorder, 3),
    Target("scope state", _states_of("scopes"), _each(_states(decode_scope, encode_scope), UnreadableStateError), 3),
    Target("shared state", _states_of("shared"), _each(_states(decode_shared, encode_shared), UnreadableStateError), 3),
    Target("ids", _states_of("ids"), _each(_slot, ValueError), 1),
    Target("price file", [encode(BOOK)], _each(lambda value: price_book_file.parse(value, name="f"),
                                               price_book_file.PriceBookError), 1),
    Target("budget file", [BUDGET_YAML.encode()], _each(
        lambda value: budget_file.parse(value.decode("utf-8", "replace"), name="f"), budget_file.BudgetFileError), 1),
    Target("public keys", [PUBLIC.encode()], _each(
        lambda value: parse_public_keys(value.decode("utf-8", "replace")), ValueError), 1),
]  # fmt: skip
"""Each with its share of the inputs."""
