"""The way nearly every usage takes: decoded by msgspec and checked here, at a tenth of what pydantic's models cost.

The contract is `wire/usage.py`, and its word is final: what is accepted here, it accepts too, with the same values
(tests/unit/test_pipeline_quick.py holds both to it over hypothesis' inputs). Whatever is not written as most emitters
write it (an instant with an offset, a name with a character too many, anything at fault) gives None, and the caller
asks the models, which accept it or say what is wrong.
"""

import re
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Annotated, Final, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from spendfuse.engine.call import Call, Who
from spendfuse.pipeline.routing import partition_of
from spendfuse.wire.base import (
    ID_PATTERN,
    LINE_PATTERN,
    MODEL_PATTERN,
    NAME_PATTERN,
    OFFSET_MAX,
    TOKENS_MAX,
    YEAR_MAX,
    YEAR_MIN,
    to_us,
)
from spendfuse.wire.packed import INDEX_BITS, PACKED_MAX
from spendfuse.wire.scopes import agent_scope
from spendfuse.wire.usage import PACK_MAX, PROVIDER_PATTERN, TAGS_MAX, TIER_PATTERN, strip_confluent_prefix

NAMES_MAX: Final = 50_000
"""Most combinations of names remembered as valid; then all are forgotten, and checked again."""
SECONDS_MAX: Final = 10_000
"""Most seconds remembered with their instant; then all are forgotten."""
LINE_CHARS_MAX: Final = 512
TAG_CHARS_MAX: Final = 128
SECOND_CHARS: Final = 19
MILLISECOND_CHARS: Final = 24
MICROSECOND_CHARS: Final = 27
SECOND_US: Final = 1_000_000

_Count = Annotated[int, Meta(ge=0, le=TOKENS_MAX)]
_Text = str | UnsetType | None


class QuickTokens(Struct, forbid_unknown_fields=True, kw_only=True, gc=False):
    """The counters, as `wire.usage.Tokens` has them."""

    input: _Count = 0
    cache_read: _Count = 0
    cache_write_5m: _Count = 0
    cache_write_1h: _Count = 0
    output: _Count = 0
    reasoning: _Count = 0


class QuickUsage(Struct, forbid_unknown_fields=True, kw_only=True):
    """A usage, as `wire.usage.Usage` has it and in its order; not validated until `checked` has said so."""

    v: Literal[1] = 1
    id: str
    ts: str
    kind: Literal["finished", "started", "progress"] = "finished"
    workspace: str
    team: str
    agent: str
    run: str
    root_run: _Text = UNSET
    parent_run: _Text = UNSET
    workflow: _Text = UNSET
    provider: str
    model: str
    tier: str = "standard"
    tokens: QuickTokens
    deadline: _Text = UNSET
    source: str = ""
    tags: dict[str, str] = {}


class _Pack(Struct, forbid_unknown_fields=True):
    usages: Annotated[list[QuickUsage], Meta(min_length=1, max_length=PACK_MAX)]
    v: Literal[1] = 1


class _Placed(Struct, forbid_unknown_fields=True):
    u: QuickUsage
    p: Annotated[int, Meta(ge=0, le=65_535)]
    o: Annotated[int, Meta(ge=0, le=OFFSET_MAX)]
    i: Annotated[int, Meta(ge=0, lt=1 << INDEX_BITS)] = 0
    t: Annotated[int, Meta(ge=-1)] = -1


class _Packed(Struct, forbid_unknown_fields=True):
    usages: Annotated[list[_Placed], Meta(min_length=1, max_length=PACKED_MAX)]
    v: Literal[1] = 1


class Checked(NamedTuple):
    """A usage that the contract accepts: whose it is, when it was, and until when it holds its tokens."""

    usage: QuickUsage
    who: Who
    ts_us: int
    deadline_us: int | None


_usage_decoder: Final = msgspec.json.Decoder(QuickUsage)
_pack_decoder: Final = msgspec.json.Decoder(_Pack)
_packed_decoder: Final = msgspec.json.Decoder(_Packed)
_encoder: Final = msgspec.json.Encoder()
encode: Final = _encoder.encode
"""Return a checked usage as JSON: byte for byte what `wire.base.encode` makes of the same usage."""
_FAULTS: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_id: Final = re.compile(ID_PATTERN).fullmatch
_name: Final = re.compile(NAME_PATTERN).fullmatch
_model: Final = re.compile(MODEL_PATTERN).fullmatch
_provider: Final = re.compile(PROVIDER_PATTERN).fullmatch
_tier: Final = re.compile(TIER_PATTERN).fullmatch
_line: Final = re.compile(LINE_PATTERN).fullmatch
_second: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}").fullmatch

_names: dict[tuple[str | UnsetType | None, ...], Who] = {}
_seconds: dict[str, int] = {}


def usages(value: bytes) -> list[Checked] | None:
    """Return the usages of a record of `usage.v1`, single or packed; None when the models have to be asked."""
    payload = strip_confluent_prefix(value)
    try:
        found = _pack_decoder.decode(payload).usages if b'"usages"' in payload else [_usage_decoder.decode(payload)]
    except _FAULTS:
        return None
    good = [each for usage in found if (each := checked(usage)) is not None]
    return good if len(good) == len(found) else None


def calls(value: bytes) -> list[Call] | None:
    """Return the calls of a record of `usage.packed.v1`; None when the models have to be asked."""
    try:
        packed = _packed_decoder.decode(value).usages
    except _FAULTS:
        return None
    found = []
    for each in packed:
        good = checked(each.u)
        if good is None:
            return None
        usage, who, ts_us, deadline_us = good
        offset, nth = each.o, each.i
        position = (offset << INDEX_BITS) | nth
        counters = usage.tokens
        tokens = (
            counters.input + counters.cache_read + counters.cache_write_5m + counters.cache_write_1h + counters.output
        )
        body = _encoder.encode(usage)  # anew, not as it came: what was decided on is what is recorded
        found.append(Call(usage, who, ts_us, deadline_us, each.p, offset, nth, position, each.t, tokens, body))
    return found


def checked(usage: QuickUsage) -> Checked | None:
    """Return a usage with its instants normalised; None when the models have to be asked."""
    names = (
        usage.workspace, usage.team, usage.agent, usage.run, usage.root_run, usage.parent_run, usage.workflow,
        usage.provider, usage.model, usage.tier, usage.source,
    )  # fmt: skip
    who = _names.get(names) or _known(usage, names)
    ts_us = _instant_us(usage.ts)
    tokens = usage.tokens
    if who is None or ts_us is None or not _id(usage.id) or tokens.reasoning > tokens.output:
        return None
    if usage.tags and not _tags(usage.tags):
        return None
    if len(usage.ts) != MICROSECOND_CHARS:
        usage.ts = _to_microseconds(usage.ts)
    deadline = usage.deadline
    if deadline is UNSET:
        return Checked(usage, who, ts_us, None)
    deadline_us = _instant_us(deadline) if isinstance(deadline, str) else None
    if deadline_us is None or usage.kind == "finished" or not isinstance(deadline, str):
        return None
    usage.deadline = _to_microseconds(deadline)
    return Checked(usage, who, ts_us, deadline_us)


def _known(usage: QuickUsage, names: tuple[str | UnsetType | None, ...]) -> Who | None:
    """Return whose a usage is once every name of it has been found valid, and remember it."""
    valid = (
        _name(usage.workspace) and _name(usage.team) and _name(usage.agent) and _id(usage.run)
        and _maybe(_id, usage.root_run) and _maybe(_id, usage.parent_run) and _maybe(_name, usage.workflow)
        and _provider(usage.provider) and _model(usage.model) and _tier(usage.tier)
        and len(usage.source) <= LINE_CHARS_MAX and _line(usage.source)
    )  # fmt: skip
    if not valid:
        return None
    workspace, team = usage.workspace, usage.team
    root = usage.root_run if isinstance(usage.root_run, str) else usage.run
    who = Who(
        f"{workspace}/{team}/{usage.agent}",
        agent_scope(workspace, team, usage.agent),
        (f"team:{workspace}/{team}", f"workspace:{workspace}", f"run:{workspace}/{root}"),
    )
    if len(_names) >= NAMES_MAX:
        _names.clear()
    _names[names] = who
    return who


def _maybe(match: Callable[[str], object], text: _Text) -> bool:
    # An explicit null is left to the models: it would be written back as one.
    return text is UNSET or (isinstance(text, str) and bool(match(text)))


def _tags(tags: dict[str, str]) -> bool:
    return len(tags) <= TAGS_MAX and all(
        _name(name) and len(text) <= TAG_CHARS_MAX and _line(text) for name, text in tags.items()
    )


def _instant_us(text: str) -> int | None:
    """Return an instant written in UTC with Z and no, three or six digits, in microseconds; None for another."""
    second_us = _seconds.get(text[:SECOND_CHARS])
    if second_us is None:
        second_us = _new_second(text[:SECOND_CHARS])
        if second_us is None:
            return None
    rest = text[SECOND_CHARS:]
    if rest == "Z":
        return second_us
    digits = rest[1:-1]
    if rest[:1] != "." or rest[-1:] != "Z" or len(digits) not in (3, 6) or not (digits.isascii() and digits.isdigit()):
        return None
    return second_us + (int(digits) if len(digits) == 6 else int(digits) * 1_000)  # noqa: PLR2004 - micro, else milli


def _new_second(text: str) -> int | None:
    if not _second(text):
        return None
    try:
        instant = datetime.fromisoformat(text + "+00:00")
    except ValueError:
        return None
    if not YEAR_MIN <= instant.year <= YEAR_MAX:
        return None
    if len(_seconds) >= SECONDS_MAX:
        _seconds.clear()
    second_us = _seconds[text] = to_us(instant)
    return second_us


def _to_microseconds(text: str) -> str:
    if len(text) == MICROSECOND_CHARS:
        return text
    return f"{text[:-1]}000Z" if len(text) == MILLISECOND_CHARS else f"{text[:-1]}.000000Z"


@lru_cache(maxsize=NAMES_MAX)
def home(path: str, partitions: int) -> int:
    """Return the packed partition on which an agent lives."""
    return partition_of(path, partitions)
