"""A table becomes usage row by row: exact counts, honest about what was made up, and never stopped by a bad row."""

import csv
import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from spendfuse.adapters.table import (
    LINE_BYTES_MAX,
    Mapping,
    PrefixCache,
    RowError,
    TableError,
    load_mapping,
    parse_map,
    preset,
    read_table,
)
from spendfuse.wire import Tokens, Usage

if TYPE_CHECKING:
    from collections.abc import Iterator

DATA = Path(__file__).parents[3] / "shared" / "data"
AZURE = DATA / "azure-llm-2023" / "AzureLLMInferenceTrace_code.csv"
MOONCAKE = DATA / "mooncake" / "conversation_trace.jsonl"
PLAIN = [
    "ts=when",
    "input=in",
    "output=out",
    "provider='openai'",
    "model=model",
]


def table(tmp_path: Path, text: str | bytes, name: str = "calls.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(path: Path, mapping: Mapping, **options: int) -> tuple[list[Usage], list[RowError]]:
    errors: list[RowError] = []
    return list(read_table(path, mapping, on_error=errors.append, **options)), errors


def test_a_csv_row_becomes_a_usage_with_every_field_from_where_the_mapping_says(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        "call,when,in,hit,w5,w1,out,think,who,where,job\n"
        "c-1,2026-11-23T04:14:15.5+01:00,1200,17000,1000,2000,800,300,planner,run-9,report\n",
    )
    mapping = parse_map(
        [
            "id=call",
            "ts=when",
            "input=in",
            "cache_read=hit",
            "cache_write_5m=w5",
            "cache_write_1h=w1",
            "output=out",
            "reasoning=think",
            "agent=who",
            "run=where",
            "workflow=job",
            "workspace='acme'",
            "team='research'",
            "provider='anthropic'",
            "model='claude-sonnet-4-6'",
            "tier='batch'",
        ]
    )
    assert read(path, mapping) == (
        [
            Usage(
                id="c-1",
                ts=datetime(2026, 11, 23, 3, 14, 15, 500_000, tzinfo=UTC),
                workspace="acme",
                team="research",
                agent="planner",
                run="run-9",
                workflow="report",
                provider="anthropic",
                model="claude-sonnet-4-6",
                tier="batch",
                tokens=Tokens(
                    input=1_200,
                    cache_read=17_000,
                    cache_write_5m=1_000,
                    cache_write_1h=2_000,
                    output=800,
                    reasoning=300,
                ),
                source="import calls",
            )
        ],
        [],
    )


@pytest.mark.parametrize(
    ("ts_format", "text", "expected"),
    [
        ("iso", "2026-11-23T03:14:15Z", datetime(2026, 11, 23, 3, 14, 15, tzinfo=UTC)),
        ("iso", "2023-11-16 18:17:03.9799609", datetime(2023, 11, 16, 18, 17, 3, 979_960, tzinfo=UTC)),
        ("iso", "2026-11-23 03:14:15-08:00", datetime(2026, 11, 23, 11, 14, 15, tzinfo=UTC)),
        ("s", "1700000000", datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)),
        ("s", "1700000000.000001", datetime(2023, 11, 14, 22, 13, 20, 1, tzinfo=UTC)),
        ("ms", "1700000000001", datetime(2023, 11, 14, 22, 13, 20, 1_000, tzinfo=UTC)),
        ("us", "1700000000000001", datetime(2023, 11, 14, 22, 13, 20, 1, tzinfo=UTC)),
    ],
)
def test_an_instant_is_read_exactly(tmp_path: Path, ts_format: str, text: str, expected: datetime) -> None:
    path = table(tmp_path, f"when,in,out,model\n{text},1,1,gpt-4o\n")
    usages, errors = read(path, parse_map([*PLAIN, f"ts_format={ts_format}"]))
    assert ([usage.ts for usage in usages], errors) == ([expected], [])


def test_a_start_moves_the_whole_file_and_keeps_the_distances(tmp_path: Path) -> None:
    path = table(tmp_path, "when,in,out,model\n2023-01-01T00:00:01Z,1,1,m\n2023-01-01T00:00:03.5Z,1,1,m\n")
    usages, _ = read(path, parse_map([*PLAIN, "start=2026-11-23T00:00:00Z"]))
    start = datetime(2026, 11, 23, tzinfo=UTC)
    assert [(usage.ts - start).total_seconds() for usage in usages] == [0, 2.5]


def test_a_row_without_an_id_has_the_same_id_on_every_reading(tmp_path: Path) -> None:
    path = table(
        tmp_path, "when,in,out,model\n\n2026-01-01T00:00:00Z,1,1,m\n2026-01-01T00:00:00Z,1,1,m\n", "my calls!.csv"
    )
    first, _ = read(path, parse_map(PLAIN))
    again, _ = read(path, parse_map(PLAIN))
    assert [usage.id for usage in first] == ["my-calls-:3", "my-calls-:4"]
    assert first == again


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"2026-01-01T00:00:00Z,x,1,m", "input: 'x' is not a number of tokens"),
        (b"2026-01-01T00:00:00Z,-1,1,m", "input: '-1' is not a number of tokens"),
        (b"2026-01-01T00:00:00Z,1.5,1,m", "input: '1.5' is not a number of tokens"),
        (b"2026-01-01T00:00:00Z,,1,m", "input: no value in column 'in'"),
        (b"2026-01-01T00:00:00Z,99999999999,1,m", "tokens.input: Input should be less than or equal to 1000000000"),
        (b"yesterday,1,1,m", "ts: 'yesterday' is not iso"),
        (b"2026-02-30T00:00:00Z,1,1,m", "ts: '2026-02-30T00:00:00Z' is not iso"),
        (b",1,1,m", "ts: is empty"),
        (b"2026-01-01T00:00:00Z,1,1", "3 fields, but the header has 4"),
        (b'2026-01-01T00:00:00Z,1,1,"m', "not one CSV row: unexpected end of data"),
        (b"2026-01-01T00:00:00Z,1,1,m\xff", "not UTF-8 at byte 26"),
        (b"2026-01-01T00:00:00Z,1,1,=cmd|'/C calc'!A0", "model: String should match pattern"),
        (b"2026-01-01T00:00:00Z,1,1,", "model: Field required"),
        (b"x" * (LINE_BYTES_MAX + 5), "the line is longer than 1,048,576 bytes"),
    ],
)
def test_a_bad_row_is_told_with_its_line_and_the_rows_around_it_are_read(
    tmp_path: Path, row: bytes, reason: str
) -> None:
    good = b"2026-01-01T00:00:00Z,1,1,m\n"
    usages, errors = read(table(tmp_path, b"when,in,out,model\n" + good + row + b"\n" + good), parse_map(PLAIN))
    assert [usage.id for usage in usages] == ["calls:2", "calls:4"]
    assert [error.row for error in errors] == [3]
    assert errors[0].reason.startswith(reason)


@pytest.mark.parametrize(
    "line",
    [
        "[1]",
        "null",
        "{",
        '{"a": NaN}',
        "[" * 50_000,
        '{"when": 1e999, "in": 1, "out": 1, "model": "m"}',
        '{"when": "2026-01-01T00:00:00Z", "in": true, "out": 1, "model": "m"}',
        '{"when": "2026-01-01T00:00:00Z", "in": [1], "out": 1, "model": "m"}',
        '{"when": "2026-01-01T00:00:00Z", "in": 1, "out": 1, "model": "\\ud800"}',
        '{"when": "2026-01-01T00:00:00Z", "out": 1, "model": "m"}',
        '{"when": "2026-01-01T00:00:00Z", "in": ' + "9" * 5_000 + ', "out": 1, "model": "m"}',
    ],
)
def test_a_bad_json_line_is_told_and_the_next_is_read(tmp_path: Path, line: str) -> None:
    good = '{"when": "2026-01-01T00:00:00Z", "in": 5, "out": 7.0, "model": "m"}'
    usages, errors = read(table(tmp_path, f"{line}\n{good}\n", "calls.jsonl"), parse_map(PLAIN))
    assert [error.row for error in errors] == [1]
    assert [(usage.tokens.input, usage.tokens.output) for usage in usages] == [(5, 7)]


def test_a_dotted_column_reaches_into_json_objects(tmp_path: Path) -> None:
    row = {"when": "2026-01-01T00:00:00Z", "usage": {"in": 5, "out": 7}, "model": "m"}
    mapping = parse_map(["ts=when", "input=usage.in", "output=usage.out", "provider='p'", "model=model"])
    usages, errors = read(table(tmp_path, json.dumps(row), "calls.ndjson"), mapping)
    assert [(usage.tokens.input, usage.tokens.output) for usage in usages] == [(5, 7)]
    assert errors == []


def test_input_that_includes_cache_is_made_disjoint_or_refused(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        "when,in,hit,out,model\n2026-01-01T00:00:00Z,21200,17000,800,m\n2026-01-01T00:00:00Z,100,101,8,m\n",
    )
    usages, errors = read(path, parse_map([*PLAIN, "cache_read=hit", "input_includes_cache=true"]))
    assert [(usage.tokens.input, usage.tokens.cache_read) for usage in usages] == [(4_200, 17_000)]
    assert errors == [RowError(3, "input: 100 is less than its 101 cached tokens")]


def test_agents_that_are_made_up_take_turns_and_are_tagged_synthetic(tmp_path: Path) -> None:
    path = table(tmp_path, "when,in,out,model\n" + "2026-01-01T00:00:00Z,1,1,m\n" * 7)
    usages, _ = read(path, parse_map([*PLAIN, "agents=3"]))
    assert Counter(usage.agent for usage in usages) == {"synthetic-1": 3, "synthetic-2": 2, "synthetic-3": 2}
    assert {usage.tags["synthetic"] for usage in usages} == {"agent"}
    assert {usage.run for usage in usages} == {"calls/synthetic-1", "calls/synthetic-2", "calls/synthetic-3"}


def test_agents_by_a_column_stay_with_its_value(tmp_path: Path) -> None:
    rows = "".join(f"2026-01-01T00:00:00Z,1,1,m,user-{n % 5}\n" for n in range(40))
    usages, _ = read(
        table(tmp_path, "when,in,out,model,user\n" + rows), parse_map([*PLAIN, "agents=3", "agents_by=user"])
    )
    by_user = [{usage.agent for usage in usages[n::5]} for n in range(5)]
    assert [len(agents) for agents in by_user] == [1] * 5


def prefix_rows(tmp_path: Path, *rows: tuple[int, list[int]]) -> Path:
    lines = (
        json.dumps({"timestamp": n, "input_length": tokens, "output_length": 1, "hash_ids": blocks})
        for n, (tokens, blocks) in enumerate(rows)
    )
    return table(tmp_path, "\n".join(lines), "trace.jsonl")


def test_blocks_seen_before_at_the_head_of_a_prompt_are_cache_reads_in_whole_blocks(tmp_path: Path) -> None:
    path = prefix_rows(
        tmp_path,
        (1_200, [1, 2, 3]),  # nothing was seen
        (1_700, [1, 2, 3, 4]),  # the three were: 1,536
        (1_200, [1, 2, 3]),  # all were: whole blocks of at most 1,199 tokens, so 1,024
        (1_024, [1, 2]),  # all were, but the last token is always read: 512
        (1_700, [9, 2, 3, 4]),  # another head: nothing
        (0, []),
    )
    usages, errors = read(path, preset("mooncake"))
    assert errors == []
    assert [usage.tokens.cache_read for usage in usages] == [0, 1_536, 1_024, 512, 0, 0]
    assert [usage.tokens.input + usage.tokens.cache_read for usage in usages] == [1_200, 1_700, 1_200, 1_024, 1_700, 0]


def test_another_model_has_a_cache_of_its_own() -> None:
    cache = PrefixCache()
    assert cache.seen_at_head("anthropic", "claude-sonnet-4-6", [1, 2]) == 0
    assert cache.seen_at_head("anthropic", "claude-opus-4-6", [1, 2]) == 0
    assert cache.seen_at_head("aws", "claude-sonnet-4-6", [1, 2]) == 0
    assert cache.seen_at_head("anthropic", "claude-sonnet-4-6", [1, 2, 3]) == 2


def test_the_cache_is_bounded_and_forgets_the_tail_of_a_prompt_before_its_head() -> None:
    cache = PrefixCache(blocks_max=4)
    cache.seen_at_head("p", "m", [1, 2, 3, 4])
    cache.seen_at_head("p", "m", [9, 8])
    assert len(cache._seen) == 4
    assert cache.seen_at_head("p", "m", [1, 2, 3, 4]) == 2


def test_a_row_without_a_list_of_blocks_is_a_bad_row(tmp_path: Path) -> None:
    path = table(tmp_path, '{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": "x"}\n', "trace.jsonl")
    assert read(path, preset("mooncake")) == ([], [RowError(1, "hash_ids: not a list of block ids")])


@pytest.mark.parametrize(
    ("items", "says"),
    [
        (["ts=when"], "provider: Field required"),
        ([*PLAIN, "inptu=x"], "inptu: Extra inputs are not permitted; write input"),
        ([*PLAIN, "input=again"], "input is given twice"),
        ([*PLAIN, "nonsense"], "'nonsense' is not field=column or field='literal'"),
        ([*PLAIN, "ts_format=offset_ms"], "needs start: the instant of offset 0"),
        ([*PLAIN, "start=2026-11-23T00:00:00"], "start: Input should have timezone info"),
        ([*PLAIN, "agents=3", "agent=who"], "leave out agent, or agents"),
        ([*PLAIN, "agents=1000000"], "agents: Input should be less than or equal to 10000"),
        ([*PLAIN, "agents_by=user"], "agents_by goes with agents"),
        ([*PLAIN, "prefix_blocks=hash_ids:512", "cache_read=hit"], "leave out cache_read"),
        (["ts=when", "provider='p'", "model='m'"], "name the column of input, of output, or both"),
    ],
)
def test_a_mapping_that_cannot_be_used_says_why(items: list[str], says: str) -> None:
    with pytest.raises(TableError) as caught:
        parse_map(items)
    assert says in str(caught.value)


def test_a_mapping_from_a_file_is_the_one_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "map.yaml"
    path.write_text(
        "ts: when\ninput: in\noutput: out\nprovider: {literal: openai}\nmodel: model\n"
        "start: 2026-11-23T00:00:00Z\nprefix_blocks: {column: hash_ids, block_tokens: 256}\n",
        encoding="utf-8",
    )
    assert load_mapping(path) == parse_map([*PLAIN, "start=2026-11-23T00:00:00Z", "prefix_blocks=hash_ids:256"])


@pytest.mark.parametrize("text", ["", "[]", "ts: [", "!!python/object:os.system {}", "ts: \x00", "a: &a [*a]"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "map.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TableError, match=r"map\.yaml: the mapping cannot be"):
        load_mapping(path)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("calls.csv", "", "no header line"),
        ("calls.csv", "when,out,model\n", "no column 'in'. The header has: 'when', 'out', 'model'"),
        ("calls.csv", "when,in,in,out,model\n", "two columns 'in'"),
        ("calls.parquet", "PAR1", "the name ends in .parquet; wanted .csv"),
    ],
)
def test_a_file_that_the_mapping_cannot_fit_is_refused_as_a_whole(
    tmp_path: Path, name: str, text: str, says: str
) -> None:
    with pytest.raises(TableError) as caught:
        read(table(tmp_path, text, name), parse_map(PLAIN))
    assert says in str(caught.value)


def test_a_missing_file_and_an_unknown_preset_are_said(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="cannot be read: No such file"):
        read(tmp_path / "none.csv", parse_map(PLAIN))
    with pytest.raises(TableError, match="the preset 'moonshine' is unknown; one of: azure-llm-2023, mooncake"):
        preset("moonshine")


def test_a_table_is_read_as_it_is_asked_for_and_not_before(tmp_path: Path) -> None:
    path = table(tmp_path, "when,in,out,model\n" + "2026-01-01T00:00:00Z,1,1,m\n" * 3 + "bad\n")
    errors: list[RowError] = []
    usages: Iterator[Usage] = read_table(path, parse_map(PLAIN), on_error=errors.append)
    assert (next(usages).id, errors) == ("calls:2", [])
    assert [usage.id for usage in usages] == ["calls:3", "calls:4"]
    assert [error.row for error in errors] == [5]


@pytest.mark.skipif(not AZURE.is_file(), reason="the Azure trace does not lie beside the project (shared/data)")
def test_the_azure_trace_has_the_totals_that_its_own_columns_sum_to() -> None:
    usages, errors = read(AZURE, preset("azure-llm-2023"))
    with AZURE.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert errors == []
    assert len(usages) == len(rows) == 8_819
    assert sum(usage.tokens.input for usage in usages) == sum(int(row["ContextTokens"]) for row in rows) == 18_059_974
    assert sum(usage.tokens.output for usage in usages) == sum(int(row["GeneratedTokens"]) for row in rows) == 245_896
    assert {usage.tokens.cache_read for usage in usages} == {0}
    assert usages[0].ts == datetime(2023, 11, 16, 18, 17, 3, 979_960, tzinfo=UTC)
    assert len({usage.id for usage in usages}) == len(usages)
    assert len({usage.agent for usage in usages}) == 23
    assert {usage.tags["synthetic"] for usage in usages} == {"agent model"}


@pytest.mark.skipif(not MOONCAKE.is_file(), reason="the Mooncake trace does not lie beside the project (shared/data)")
def test_the_mooncake_trace_has_the_totals_and_the_prefix_hits_that_a_plain_set_finds() -> None:
    usages, errors = read(MOONCAKE, preset("mooncake"))
    seen: set[int] = set()
    cached: list[int] = []
    rows = [json.loads(line) for line in MOONCAKE.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        blocks = 0
        while blocks < len(row["hash_ids"]) and row["hash_ids"][blocks] in seen:
            blocks += 1
        while blocks * 512 >= row["input_length"]:
            blocks -= 1
        cached.append(blocks * 512)
        seen.update(row["hash_ids"])
    assert errors == []
    assert [usage.tokens.cache_read for usage in usages] == cached
    assert [usage.tokens.input + usage.tokens.cache_read for usage in usages] == [row["input_length"] for row in rows]
    assert [usage.tokens.output for usage in usages] == [row["output_length"] for row in rows]
    assert (len(usages), sum(row["input_length"] for row in rows), sum(cached)) == (12_031, 144_793_823, 54_063_104)
    assert usages[-1].ts - usages[0].ts == timedelta(milliseconds=rows[-1]["timestamp"])
