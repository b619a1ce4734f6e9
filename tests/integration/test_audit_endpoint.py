"""The embedded ClickHouse over HTTP: the ordinary client works, and nobody writes, reads files or stays too long."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from pydantic import SecretStr

from audit_samples import charge, message, totals

pytest.importorskip("chdb", reason="the embedded ClickHouse needs the chdb package")
clickhouse = pytest.importorskip("clickhouse_connect.driver.exceptions")
aiohttp = pytest.importorskip("aiohttp")

from spendfuse.audit import endpoint as endpoint_module  # noqa: E402
from spendfuse.audit import migrate, queries, readonly, trail  # noqa: E402
from spendfuse.audit.batches import Collector, Message  # noqa: E402
from spendfuse.audit.database import Engine, open_embedded  # noqa: E402
from spendfuse.audit.endpoint import Endpoint  # noqa: E402
from spendfuse.audit.files import SqlMissingError  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from spendfuse.audit.address import Address

TOKEN = "a-token-for-one-test"
ENTRIES = [charge(nth) for nth in range(300)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    opened = Engine(tmp_path_factory.mktemp("endpoint") / "clickhouse", "trail")
    database = open_embedded(opened)
    try:
        migrate.apply(database)
        collector = Collector("spendfuse.ledger.v1", 0, 1, 1, {}, 5_000)
        assert collector.add(Message(0, 0, message(ENTRIES)))
        trail.store(database, collector.seal())
        yield opened
    finally:
        database.close()


@pytest_asyncio.fixture
async def address(engine: Engine) -> AsyncIterator[Address]:
    endpoint = Endpoint(engine, TOKEN, 0)
    try:
        yield await endpoint.start()
    finally:
        await endpoint.stop()


async def post(address: Address, statement: str, **given: Any) -> tuple[int, str, str]:
    """Status, exception code and text of a raw request."""
    headers = {"X-ClickHouse-User": "reader", "X-ClickHouse-Key": TOKEN, **given.pop("headers", {})}
    async with (
        aiohttp.ClientSession() as session,
        session.post(address.url, data=statement.encode(), headers=headers, **given) as answer,
    ):
        return answer.status, answer.headers.get("X-ClickHouse-Exception-Code", ""), await answer.text()


async def test_the_ordinary_client_runs_a_shipped_query_with_exact_sums(address: Address) -> None:
    def ask() -> list[dict[str, Any]]:
        with queries.connect_to(address) as client:
            result = client.query(queries.load("totals"), parameters={"workspace": "acme"})
            return list(result.named_results())

    rows = await asyncio.to_thread(ask)
    assert {(row["team"], row["agent"]): row["cost_nanos"] for row in rows} == {
        key: values[-1] for key, values in totals(ENTRIES).items()
    }


async def test_the_ordinary_client_binds_streams_describes_and_reads_hostile_strings(address: Address) -> None:
    hostile = "it's \\ \"quoted\"\n\t; DROP TABLE usage_events -- file('/etc/passwd')"

    def ask() -> None:
        with queries.connect_to(address) as client:
            assert client.query("SELECT {text:String}, {numbers:Array(Int64)}", {"text": hostile, "numbers": [1, -2]})\
                .result_rows == [(hostile, [1, -2])]  # fmt: skip
            assert client.query("SELECT %(text)s", {"text": hostile}).result_rows == [(hostile,)]
            with client.query_rows_stream("SELECT number FROM numbers(100000)") as stream:
                assert sum(row[0] for row in stream) == 4_999_950_000
            assert client.command("SELECT count() FROM usage_events") == 300
            assert client.query("SELECT tags FROM usage_events LIMIT 1").result_rows[0][0]["note"].startswith("o'brien")
            assert client.query("SELECT 1 LIMIT 0").column_names == ("1",)
            assert json.loads(client.raw_query("SELECT 1 AS one", fmt="JSONEachRow")) == {"one": 1}
            large = "x" * 200_000
            assert client.query("SELECT length({text:String})", {"text": large}).result_rows == [(200_000,)]
            with pytest.raises(clickhouse.DatabaseError, match="UNKNOWN_TABLE") as raised:
                client.query("SELECT * FROM nothing")
            assert raised.value.code == 60

    await asyncio.to_thread(ask)


def row_binary(body: bytes) -> tuple[list[str], list[str], bytes]:
    """Names, types and the values' bytes of RowBinaryWithNamesAndTypes, in which every length is below 128 here."""
    texts, place = [], 1
    for _ in range(2 * body[0]):
        texts.append(body[place + 1 : place + 1 + body[place]].decode())
        place += 1 + body[place]
    return texts[: body[0]], texts[body[0] :], body[place:]


async def test_a_client_over_jdbc_such_as_dbeaver_finds_its_tables_and_reads_them(address: Address) -> None:
    # What clickhouse-jdbc sends, with compress=0 among the connection's properties: a session, basic authentication.
    said = {
        "session_id": "dbeaver",
        "database": "trail",
        "default_format": "RowBinaryWithNamesAndTypes",
        "compress": "0",
    }
    basic = {"Authorization": "Basic " + base64.b64encode(f"reader:{TOKEN}".encode()).decode()}

    async def ask(statement: str) -> tuple[list[str], list[str], bytes]:
        async with (
            aiohttp.ClientSession() as session,
            session.post(address.url, params=said, data=statement.encode(), headers=basic) as answer,
        ):
            body = await answer.read()
            assert answer.status == 200, body
            assert answer.headers["X-ClickHouse-Format"] == "RowBinaryWithNamesAndTypes"
            return row_binary(body)

    names, types, _ = await ask("SELECT timezone() AS timezone, version() AS version")
    assert (names, types) == (["timezone", "version"], ["String", "String"])
    _, _, tables = await ask("SELECT name FROM system.tables WHERE database = 'trail' AND name LIKE 'usage%'")
    assert tables == b"\x0cusage_events"
    names, _, _ = await ask("SELECT name, type FROM system.columns WHERE database = 'trail' AND table = 'usage_events'")
    assert names == ["name", "type"]
    _, types, count = await ask("SELECT count() AS calls FROM usage_events")
    assert (types, int.from_bytes(count, "little")) == (["UInt64"], len(ENTRIES))
    _, _, over = await ask("SELECT sum(calls) FROM spend_over(since = 0, until = 4000000000)")
    assert int.from_bytes(over, "little") == len(ENTRIES)
    said["compress"] = "1"
    status, code, text = await post(address, "SELECT 1", params=said)
    assert (status, code) == (400, "36")
    assert "compress" in text, "it says which property to change"


@pytest.mark.parametrize(
    ("user", "key"),
    [
        ("reader", ""),
        ("reader", "wrong"),
        ("", TOKEN),
        ("default", TOKEN),
        ("reader", TOKEN + "x"),
        ("reader", "\u00e9"),
    ],
)
async def test_without_the_right_user_and_token_nothing_is_answered(address: Address, user: str, key: str) -> None:
    async with aiohttp.ClientSession() as session:
        for given in (
            {"headers": {"X-ClickHouse-User": user, "X-ClickHouse-Key": key}},
            {"headers": {"Authorization": f"Basic {base64.b64encode(f'{user}:{key}'.encode()).decode()}"}},
            {"headers": {"Authorization": f"Basic {key}"}},
            {"params": {"user": user, "password": key}},
        ):
            async with session.post(address.url, data=b"SELECT 1", **given) as answer:
                assert (answer.status, answer.headers["X-ClickHouse-Exception-Code"]) == (403, "516")
                text = await answer.text()
                assert TOKEN not in text
        async with session.get(f"{address.url}/ping") as answer:
            assert await answer.text() == "Ok.\n"

    def connect() -> None:
        queries.connect_to(address.model_copy(update={"token": SecretStr(key), "user": user or "x"}))

    with pytest.raises(queries.AuditNotRunningError, match="Restart it"):
        await asyncio.to_thread(connect)


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO usage_events (usage_id) VALUES ('x')",
        "INSERT INTO FUNCTION file('/tmp/x', 'CSV', 'a Int8') SELECT 1",
        "DROP TABLE usage_events",
        "TRUNCATE TABLE usage_events",
        "ALTER TABLE usage_events DELETE WHERE 1",
        "CREATE TEMPORARY TABLE t (a Int8)",
        "SYSTEM STOP MERGES",
        "KILL QUERY WHERE 1",
        "SELECT 1 PARALLEL WITH SYSTEM STOP MERGES",
        "SET readonly = 0",
        "SELECT 1 SETTINGS readonly = 0",
        "SELECT * FROM (SELECT 1 SETTINGS max_execution_time = 0)",
        "BACKUP DATABASE trail TO File('/tmp/b')",
        "GRANT ALL ON *.* TO default",
        "SELECT file('/etc/hostname')",
        "SELECT \"\\x66ile\"('/etc/hostname')",
        "SELECT 1 AS `a'`, file('/etc/hostname') AS `b'`",
        "SELECT arrayMap(file, ['/etc/hostname'])",
        "SELECT * APPLY file FROM (SELECT '/etc/hostname')",
        "SELECT $q$it's$q$, file('/etc/hostname') -- '",
        "SELECT * FROM file('/etc/hostname', 'LineAsString')",
        "DESCRIBE TABLE file('/etc/hostname', 'CSV')",
        "SELECT * FROM url('http://127.0.0.1:9/', 'CSV', 'a String')",
        "DESCRIBE TABLE s3('http://127.0.0.1:9/bucket/key.csv')",
        "SELECT * FROM remote('127.0.0.1:9', system.one)",
        "SELECT * FROM python(x)",
        "SELECT * FROM eval('SELECT 1')",
        "SELECT 1; SELECT 2",
        "SELECT FROM WHERE",
    ],
)
async def test_what_is_not_a_read_of_tables_is_refused(address: Address, statement: str) -> None:
    status, code, text = await post(address, statement)
    assert (status, code) in ((400, "62"), (403, "164"), (403, "497")), text
    assert os.uname().nodename not in text


async def test_a_result_is_not_written_to_a_file(address: Address, tmp_path: Path) -> None:
    status, code, _ = await post(address, f"SELECT 1 INTO OUTFILE '{tmp_path}/out'")
    assert (status, code, (tmp_path / "out").exists()) == (403, "164", False)


async def test_a_parameter_that_names_something_may_only_name_a_table_or_column(address: Address) -> None:
    statement = "SELECT count() FROM {t:Identifier}"
    assert await post(address, statement, params={"param_t": "usage_events"}) == (200, "", "300\n")
    for name in ("file", "\\x66ile", "`file`", ""):
        params = {"param_f": name}
        status, code, _ = await post(address, "SELECT arrayMap({f:Identifier}, ['/etc/hostname'])", params=params)
        assert (status, code) == (403, "164")


async def test_a_client_s_settings_are_taken_from_a_list_and_never_lift_a_limit(address: Address) -> None:
    params = {
        "join_use_nulls": "1", "max_execution_time": "0", "readonly": "0", "max_result_bytes": "0", "no such": "'; --",
        "session_timezone": "x' , readonly = '0",
    }  # fmt: skip
    status, code, text = await post(address, "SELECT 1", params=params)
    assert (status, code) == (400, "36"), text  # the whole of it is the value, and no time zone
    del params["session_timezone"]
    statement = (
        "SELECT getSetting('join_use_nulls'), getSetting('readonly'), getSetting('max_execution_time'), "
        "getSetting('max_result_bytes') > 0 FORMAT CSV"
    )
    assert await post(address, statement, params=params) == (200, "", f"true,1,{readonly.QUERY_S_MAX},1\n")


async def test_one_query_s_database_and_settings_are_not_the_next_one_s(address: Address) -> None:
    await post(address, "SELECT 1", params={"database": "system", "join_use_nulls": "1"})
    assert await post(address, "SELECT currentDatabase(), getSetting('join_use_nulls')") == (200, "", "trail\tfalse\n")


@pytest.mark.parametrize("database", ["no`where", "x; DROP", "a" * 100])
async def test_a_database_name_is_only_ever_a_name(address: Address, database: str) -> None:
    status, code, _ = await post(address, "SELECT 1", params={"database": database})
    assert (status, code) == (404, "81")


async def test_bodies_answers_and_times_are_bounded(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    status, _, _ = await post(address, "SELECT " + "1," * 600_000 + "1")
    assert status == 413
    monkeypatch.setattr(readonly, "LIMITS", {"max_execution_time": 1, "max_result_bytes": 10_000})
    assert (await post(address, "SELECT count() FROM numbers(1000000000000)"))[:2] == (504, "159")
    assert (await post(address, "SELECT number FROM numbers(1000000)"))[1] == "396"


async def test_more_queries_than_may_wait_are_turned_away_and_the_others_answered(
    address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_module, "WAITING_MAX", 2)
    answers = await asyncio.gather(*(post(address, "SELECT sleep(0.3)") for _ in range(12)))
    statuses = [status for status, _, _ in answers]
    assert statuses.count(200) >= endpoint_module.QUERIES_MAX
    assert {code for status, code, _ in answers if status == 503} == {"202"}
    assert (await post(address, "SELECT 1"))[0] == 200


@pytest.mark.parametrize("body", [b"\xff\xfe", b"", b"\x00", "SELECT '\u20ac'".encode()])
async def test_any_bytes_get_an_answer(address: Address, body: bytes) -> None:
    async with aiohttp.ClientSession() as session:
        headers = {"X-ClickHouse-User": "reader", "X-ClickHouse-Key": TOKEN}
        async with session.post(address.url, data=body, headers=headers) as answer:
            assert answer.status in (200, 400)


async def test_it_listens_on_loopback_only(address: Address) -> None:
    assert address.url.startswith("http://127.0.0.1:")
    port = int(address.url.rpartition(":")[2])
    import psutil

    listening = [each.laddr for each in psutil.Process().net_connections() if each.status == "LISTEN"]
    assert [each.ip for each in listening if each.port == port] == ["127.0.0.1"]


HELLO = "SELECT displayName(), version(), revision(), timezone()"


async def raw(address: Address, statement: str, params: dict[str, str], **headers: str) -> tuple[int, bytes, str]:
    """Status, bytes as they came over the wire, and their encoding."""
    given = {"X-ClickHouse-User": "reader", "X-ClickHouse-Key": TOKEN, **headers}
    async with (
        aiohttp.ClientSession(auto_decompress=False) as session,
        session.post(address.url, data=statement.encode(), headers=given, params=params) as answer,
    ):
        return answer.status, await answer.read(), answer.headers.get("Content-Encoding", "")


async def test_clickhouse_go_s_greeting_is_answered_byte_for_byte_in_its_framing(address: Address) -> None:
    version = (await post(address, "SELECT version()"))[2].strip().encode()
    block = (
        b"\x01\x00\x02\xff\xff\xff\xff\x00"  # block info: no overflow, bucket -1, end
        b"\x04\x01"  # four columns of one row, each with a zero for "no custom serialization"
        b"\x0ddisplayName()\x06String\x00\x12spendfuse-embedded"
        b"\x09version()\x06String\x00" + bytes([len(version)]) + version +
        b"\x0arevision()\x06UInt32\x00\x00\x00\x00\x00"
        b"\x0atimezone()\x06String\x00\x03UTC"
    )  # fmt: skip
    go = {"client_protocol_version": "54478", "default_format": "Native"}
    assert await raw(address, HELLO, go) == (200, block, "")
    assert await raw(address, f"{HELLO}\nFORMAT Native", go) == (200, block, "")
    # What follows is read as blocks of revision 0: columns and rows, and each column's name, type and data.
    assert await raw(address, "SELECT toUInt8(7) AS x", go) == (200, b"\x01\x01\x01x\x05UInt8\x07", "")
    status, plain, _ = await raw(address, "SELECT displayName(), version(), timezone()", go)
    assert (status, plain[:2]) == (200, b"\x03\x01")


@pytest.mark.parametrize(
    ("asked", "accepted", "encoding"),
    [("1", "gzip", "gzip"), ("1", "gzip, deflate, br", "gzip"), ("0", "gzip", ""), ("1", "br", ""), ("", "gzip", "")],
)
async def test_an_answer_is_compressed_when_both_header_and_setting_ask_for_it(
    address: Address, asked: str, accepted: str, encoding: str
) -> None:
    import gzip

    params = {"enable_http_compression": asked} if asked else {}
    status, body, came = await raw(
        address, "SELECT number FROM numbers(50000)", params, **{"Accept-Encoding": accepted}
    )
    assert (status, came) == (200, encoding)
    plain = gzip.decompress(body) if encoding else body
    assert plain == b"".join(b"%d\n" % number for number in range(50_000))
    assert not encoding or len(body) < len(plain)


async def test_a_body_that_inflates_beyond_the_limit_is_refused_and_other_codecs_are_named(address: Address) -> None:
    import gzip

    headers = {"X-ClickHouse-User": "reader", "X-ClickHouse-Key": TOKEN, "Content-Encoding": "gzip"}
    async with aiohttp.ClientSession() as session:
        small = gzip.compress(b"SELECT 1")
        async with session.post(address.url, data=small, headers=headers) as answer:
            assert (answer.status, await answer.text()) == (200, "1\n")
        bomb = gzip.compress(b" " * (endpoint_module.BODY_BYTES_MAX * 20))
        async with session.post(address.url, data=bomb, headers=headers) as answer:
            assert answer.status == 413
    for name in ("compress", "decompress"):
        status, code, text = await post(address, "SELECT 1", params={name: "1"})
        assert (status, code, "gzip" in text) == (400, "36", True)


async def test_the_ordinary_async_client_works_compressed_and_not(address: Address) -> None:
    from clickhouse_connect import get_async_client

    host, _, port = address.url.removeprefix("http://").partition(":")
    for compress in (True, False):
        client = await get_async_client(
            host=host, port=int(port), username=address.user, password=TOKEN, database=address.database,
            compress="gzip" if compress else False, autogenerate_session_id=False,
        )  # fmt: skip
        try:
            result = await client.query(queries.load("totals"), parameters={"workspace": "acme"})
            total = sum(row["cost_nanos"] for row in result.named_results())
            assert total == sum(values[-1] for values in totals(ENTRIES).values())
            answers = await asyncio.gather(*(client.query("SELECT {n:UInt8}", {"n": n}) for n in range(8)))
            assert [answer.result_rows for answer in answers] == [[(n,)] for n in range(8)]
            with pytest.raises(clickhouse.DatabaseError):
                await client.command("DROP TABLE usage_events")
        finally:
            await client.close()


def test_a_query_is_loaded_from_its_folder_and_a_name_never_leads_elsewhere() -> None:
    written = Path(__file__).parents[2] / "sql" / "queries" / "grafana" / "burn_rate.sql"
    assert queries.load("grafana/burn_rate") == written.read_text(encoding="utf-8")
    for name in ("../migrations/0001_database", "grafana/../totals", "/etc/passwd", "grafana/", "Totals", "a/b/c", ""):
        with pytest.raises(SqlMissingError, match=r"grafana/burn_rate, .*totals"):
            queries.load(name)
