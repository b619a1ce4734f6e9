"""Which column, or literal, of a table becomes which field of a usage: declared, checked, and known for some traces."""

from collections.abc import Sequence
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import yaml
from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from spendfuse.adapters.yaml_nodes import TEXT_CHARS_MAX, UnreadableError, compose
from spendfuse.wire.base import TOKENS_MAX

AGENTS_MAX: Final = 10_000
COUNTERS: Final = ("input", "cache_read", "cache_write_5m", "cache_write_1h", "output", "reasoning")
NAMES: Final = ("workspace", "team", "agent", "run", "workflow", "provider", "model", "tier")


class TableError(Exception):
    """A file or mapping that cannot be used at all: what is wrong, and what to do next."""


class Source(BaseModel):
    """Where a field's value is from: a column (a dotted path reaches into JSON objects), or a literal for all rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    column: str | None = None
    literal: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.column is None) == (self.literal is None):
            raise ValueError("give either column or literal")
        return self


def _source(value: object) -> object:
    """Read `column` and `'literal'` as a `Source`."""
    if not isinstance(value, str):
        return value
    if len(value) > 1 and value[0] == value[-1] == "'":
        return Source(literal=value[1:-1])
    return Source(column=value)


From = Annotated[Source, BeforeValidator(_source)]


class PrefixBlocks(BaseModel):
    """A column that lists the ids of a prompt's blocks, so that cache reads can be derived from prefixes seen before.

    With n input tokens of which the first k blocks were seen earlier for the same provider and model,
    `cache_read = min(k, (n - 1) // block_tokens) * block_tokens` and `input = n - cache_read`: whole blocks only, and
    never the last token, since a model must read at least one to answer. New blocks stay plain `input`; what a
    provider asks for writing them is not in such a trace and is not made up. Nothing expires but by `BLOCKS_MAX`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    column: str
    block_tokens: Annotated[int, Field(ge=1, le=TOKENS_MAX)] = 512


def _prefix_blocks(value: object) -> object:
    """Read `hash_ids:512` as `PrefixBlocks`."""
    if not isinstance(value, str):
        return value
    column, colon, size = value.rpartition(":")
    return {"column": column, "block_tokens": size} if colon else {"column": value}


class Mapping(BaseModel):
    """Which column, or literal, each field of a usage is from.

    `ts_format`: `iso` (RFC 3339, or `YYYY-mm-dd HH:MM:SS` with up to 9 digits, UTC when it has no offset; finer than
    a microsecond is cut), `s`, `ms`, `us` since the epoch, or `offset_ms` after `start`. With another format `start`
    moves the whole file: its first row is at `start`, the others keep their distance.
    `agents` makes up that many agents, by turns or by the hash of the column `agents_by`; such usage is tagged
    `synthetic`. `input_includes_cache` subtracts the cache counters from `input`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ts: From
    ts_format: Literal["iso", "s", "ms", "us", "offset_ms"] = "iso"
    start: AwareDatetime | None = None
    id: From | None = None
    input: From | None = None
    cache_read: From | None = None
    cache_write_5m: From | None = None
    cache_write_1h: From | None = None
    output: From | None = None
    reasoning: From | None = None
    input_includes_cache: bool = False
    workspace: From = Source(literal="imported")
    team: From = Source(literal="imported")
    agent: From | None = None
    run: From | None = None
    workflow: From | None = None
    provider: From
    model: From
    tier: From | None = None
    agents: Annotated[int, Field(ge=1, le=AGENTS_MAX)] | None = None
    agents_by: str | None = None
    prefix_blocks: Annotated[PrefixBlocks, BeforeValidator(_prefix_blocks)] | None = None
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","
    synthetic: str = ""

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if self.ts_format == "offset_ms" and self.start is None:
            raise ValueError("ts_format offset_ms needs start: the instant of offset 0")
        if self.agents is not None and self.agent is not None:
            raise ValueError("agents makes names up: leave out agent, or agents")
        if self.input is None and self.output is None:
            raise ValueError("name the column of input, of output, or both")
        if self.agents_by is not None and self.agents is None:
            raise ValueError("agents_by goes with agents")
        if self.prefix_blocks is not None and (self.cache_read is not None or self.input is None):
            raise ValueError("prefix_blocks derives cache_read from input: give input, leave out cache_read")
        return self

    def columns(self) -> list[str]:
        """Return every column that a row must have."""
        sources = [getattr(self, name) for name in ("ts", "id", *COUNTERS, *NAMES)]
        named = [source.column for source in sources if source is not None and source.column is not None]
        if self.agents_by is not None:
            named.append(self.agents_by)
        if self.prefix_blocks is not None:
            named.append(self.prefix_blocks.column)
        return list(dict.fromkeys(named))


PRESETS: Final[dict[str, dict[str, object]]] = {
    # The traces name no agents, models or prices: what is made up is said in the tag `synthetic`.
    "azure-llm-2023": {
        "ts": "TIMESTAMP",
        "input": "ContextTokens",
        "output": "GeneratedTokens",
        "workspace": "'trace'",
        "team": "'azure-llm-2023'",
        "provider": "'openai'",
        "model": "'gpt-4o'",
        "agents": 23,
        "synthetic": "agent model",
    },
    "mooncake": {
        "ts": "timestamp",
        "ts_format": "offset_ms",
        "start": datetime(2026, 11, 23, tzinfo=UTC),
        "input": "input_length",
        "output": "output_length",
        "prefix_blocks": {"column": "hash_ids", "block_tokens": 512},
        "workspace": "'trace'",
        "team": "'mooncake'",
        "provider": "'anthropic'",
        "model": "'claude-sonnet-4-6'",
        "agents": 23,
        "synthetic": "agent model start",
    },
}


def preset(name: str, **changes: object) -> Mapping:
    """Return the mapping of a known trace; `changes` replace its fields, such as `start` or `agents`.

    Raises `TableError` for an unknown name.
    """
    if name not in PRESETS:
        raise TableError(f"the preset {name[:80]!r} is unknown; one of: {', '.join(PRESETS)}")
    return _validated({**PRESETS[name], **changes}, f"preset {name}")


def parse_map(items: Sequence[str]) -> Mapping:
    """Return the mapping of `field=column`, `field='literal'` and `option=value` strings. Raises `TableError`."""
    values: dict[str, object] = {}
    faults: list[str] = []
    for item in items:
        field, equals, value = item.partition("=")
        if not equals or not value:
            faults.append(f"{item[:80]!r} is not field=column or field='literal'")
        elif field in values:
            faults.append(f"{field[:80]} is given twice")
        else:
            values[field] = value
    if faults:
        raise TableError("the mapping cannot be used:\n" + "\n".join(f"  {fault}" for fault in faults))
    return _validated(values, "mapping")


def load_mapping(path: Path) -> Mapping:
    """Return the mapping in a YAML or JSON file. Raises `TableError`."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(TEXT_CHARS_MAX + 1)
        compose(text)  # bounds: length, depth, aliases
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, UnreadableError, yaml.YAMLError) as error:
        raise TableError(f"{path}: the mapping cannot be read: {error}") from error
    return _validated(values, str(path))


def _validated(values: object, name: str) -> Mapping:
    try:
        return Mapping.model_validate(values)
    except ValidationError as error:
        known = list(Mapping.model_fields)
        lines: list[str] = []
        for fault in error.errors(include_input=False, include_url=False, include_context=False):
            field = ".".join(str(part) for part in fault["loc"])
            near = get_close_matches(field, known, n=1) if fault["type"] == "extra_forbidden" else []
            hint = f"; write {near[0]}" if near else ""
            lines.append(f"  {field or 'mapping'}: {fault['msg']}{hint}")
        raise TableError(f"{name}: the mapping cannot be used:\n" + "\n".join(lines)) from error
