"""One read-only query of the embedded engine at a time, on a handle of its own. Blocking; the caller has threads.

Three locks, because none is enough alone (tried on chDB 26.9): `readonly=1` on the handle refuses writes, settings
and table functions but lets `SYSTEM`, `KILL`, `INTO OUTFILE` and the scalar `file()` pass; the grants of `database.py`
refuse sources; and the statement itself is looked at here, after the engine has parsed and rewritten it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import chdb

from spendfuse.audit.database import Engine

QUERY_S_MAX: Final = 30
RESULT_BYTES_MAX: Final = 134_217_728
MEMORY_BYTES_MAX: Final = 2_147_483_648
SETTING_CHARS_MAX: Final = 1_000
LIMITS: Final[Mapping[str, int]] = {
    "max_execution_time": QUERY_S_MAX,
    "max_result_bytes": RESULT_BYTES_MAX,
    "max_memory_usage": MEMORY_BYTES_MAX,
}
SETTINGS_ALLOWED: Final = frozenset({
    "additional_table_filters",
    "date_time_output_format",
    "extremes",
    "group_by_overflow_mode",
    "join_use_nulls",
    "limit",
    "max_block_size",
    "max_result_rows",
    "max_rows_to_read",
    "max_threads",
    "offset",
    "output_format_json_quote_64bit_integers",
    "result_overflow_mode",
    "session_timezone",
    "totals_mode",
})  # fmt: skip
"""What a client may set for its query; anything else it sends is left out, as if the server did not know it."""

_PARSED: Final = "SELECT formatQuerySingleLine({statement:String})"
_QUOTED: Final = re.compile(r"'(?:\\.|[^'\\])*'|`(?:\\.|[^`\\])*`|\"(?:\\.|[^\"\\])*\"", re.DOTALL)
_READS: Final = re.compile(r"\(*(?:SELECT|WITH|SHOW|DESCRIBE|EXISTS|EXPLAIN)\b")
# The engine writes keywords in capitals, one blank at a time, and quotes no name that does not need it. The names are
# refused wherever they stand: `arrayMap(file, ...)` and `APPLY file` call without a parenthesis.
_REFUSED: Final = re.compile(
    r"\bINTO OUTFILE\b|\bPARALLEL WITH\b|\bSETTINGS \w+ = "
    r"|(?i:\b(?:file|eval|python|arrowstream|executable|ai(?:classify|embed|extract|filter|generate|redact|similarity"
    r"|translate))\b)"
)
_IDENTIFIER: Final = re.compile(r"\{(\w+):Identifier\}")
_PLAIN_NAME: Final = re.compile(r"[A-Za-z_]\w*")
_FORMAT: Final = re.compile(r"\bFORMAT (\w+)\s*\Z")
_DATABASE: Final = re.compile(r"[A-Za-z_]\w{0,62}")
_CODE: Final = re.compile(r"Code: (\d+)\.")

READONLY: Final = 164
UNKNOWN_DATABASE: Final = 81
SYNTAX_ERROR: Final = 62
UNKNOWN_EXCEPTION: Final = 1002


class QueryRefusedError(Exception):
    """The engine, or this module, refuses a query; `code` is ClickHouse's."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, slots=True)
class Query:
    """A statement with its parameters (in ClickHouse's escaped text form), settings, database and output format.

    `is_hello` and `gzip` are for who answers: a greeting in clickhouse-go's framing, and a body that may be compressed.
    """

    statement: str
    parameters: Mapping[str, str]
    settings: Mapping[str, str]
    database: str
    output_format: str
    is_hello: bool = False
    gzip: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """The bytes of a result, their format, and what was read for it."""

    body: bytes
    output_format: str
    rows_read: int
    bytes_read: int
    elapsed_ns: int


def run(engine: Engine, query: Query) -> Answer:
    """Run a query read-only; raises QueryRefusedError with the engine's code and sentence."""
    try:
        # A handle costs half a millisecond, and with it go the USE, SET and temporary tables of the query before.
        handle = chdb.connect(engine.connection)  # type: ignore[no-untyped-call]
        try:
            return _run(handle, query)
        finally:
            handle.close()
    except RuntimeError as error:
        raise _refused(error) from error


def _run(handle: Any, query: Query) -> Answer:
    if not _DATABASE.fullmatch(query.database):
        raise QueryRefusedError(UNKNOWN_DATABASE, "the database name is not one: use letters, digits and _")
    handle.query(f"USE `{query.database}`")
    chosen = {name: value for name, value in query.settings.items() if name in SETTINGS_ALLOWED}
    for name, value in {**chosen, **LIMITS}.items():
        handle.query(f"SET {name} = {_quoted(str(value)[:SETTING_CHARS_MAX])}")
    handle.query("SET readonly = 1")
    parsed = handle.query(_PARSED, "TSVRaw", params={"statement": _escaped(query.statement)}).bytes().decode()
    check_statement(parsed, query.parameters)
    result = handle.query(query.statement, query.output_format, params=dict(query.parameters))
    named = _FORMAT.search(parsed)
    return Answer(
        body=result.bytes() or b"",
        output_format=named[1] if named else query.output_format,
        rows_read=result.rows_read(),
        bytes_read=result.bytes_read(),
        elapsed_ns=int(result.elapsed() * 1_000_000_000),
    )


def check_statement(parsed: str, parameters: Mapping[str, str]) -> None:
    """Raise QueryRefusedError unless a statement, as the engine writes it, only reads tables."""
    bare = _QUOTED.sub("''", parsed)
    if not _READS.match(bare):
        raise QueryRefusedError(
            READONLY, "this endpoint is read-only: SELECT, WITH, SHOW, DESCRIBE, EXISTS and EXPLAIN"
        )
    if found := _REFUSED.search(bare):
        raise QueryRefusedError(READONLY, f"this endpoint reads tables only: {found[0].strip(' =')} is refused")
    for name in _IDENTIFIER.findall(bare):
        value = parameters.get(name, "")
        if not _PLAIN_NAME.fullmatch(value) or _REFUSED.search(value):
            raise QueryRefusedError(READONLY, f"parameter {name} is not the name of a table or column")


def _refused(error: RuntimeError) -> QueryRefusedError:
    text = str(error)
    text = text[max(text.find("Code: "), 0) :].strip()
    code = _CODE.match(text)
    return QueryRefusedError(int(code[1]) if code else UNKNOWN_EXCEPTION, text)


def _escaped(text: str) -> str:
    """Return text as a query parameter is read: ClickHouse's Escaped form."""
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
