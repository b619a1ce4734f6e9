"""A ClickHouse server for tests: chDB behind ClickHouse's HTTP protocol, to read and write, in a process to be killed.

    python tests/clickhouse_server.py DIRECTORY DATABASE PORT

Its one account has the rights of a migrator and writer. It prints a line when it listens. No product code writes to it
but through clickhouse-connect's ordinary HTTP client: what is tested is the way to a server.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import tempfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import chdb
import lz4.frame

from spendfuse.audit.database import Engine

TRANSPORT = frozenset({
    "query", "database", "user", "password", "session_id", "session_timeout", "session_check", "query_id", "quota_key",
    "compress", "decompress", "wait_end_of_query", "client_protocol_version", "role", "default_format", "buffer_size",
    "enable_http_compression", "send_progress_in_http_headers", "http_headers_progress_interval_ms",
    "cancel_http_readonly_queries_on_client_close", "output_format_native_write_json_as_string",
})  # fmt: skip
INSERT = re.compile(rb"\s*(INSERT\s+INTO\s+.+?)\s+FORMAT\s+(\w+)[ \t]*\r?\n?", re.IGNORECASE | re.DOTALL)
BODY_BYTES_MAX = 67_108_864


class BodyCutError(Exception):
    """The client went away in the middle of a body."""


def body_of(request: BaseHTTPRequestHandler) -> bytes:
    """Return a whole body as it was sent, chunked or not."""
    if request.headers.get("Transfer-Encoding", "").lower() != "chunked":
        length = int(request.headers.get("Content-Length") or 0)
        whole = request.rfile.read(length)
        if len(whole) < length:
            raise BodyCutError
        return whole
    parts: list[bytes] = []
    while True:
        line = request.rfile.readline(100)
        if not line.endswith(b"\r\n"):
            raise BodyCutError
        size = int(line.split(b";")[0], 16)
        part = request.rfile.read(size)
        if len(part) < size or sum(map(len, parts)) > BODY_BYTES_MAX:
            raise BodyCutError
        request.rfile.readline(100)
        if not size:
            return b"".join(parts)
        parts.append(part)


def inflated(body: bytes, encoding: str) -> bytes:
    """Return a body without its Content-Encoding; clickhouse-connect takes lz4 when left to itself."""
    if encoding == "lz4":
        return bytes(lz4.frame.decompress(body))
    return gzip.decompress(body) if encoding == "gzip" else body


class Server(ThreadingHTTPServer):
    """The server, and the engine it serves."""

    daemon_threads = True

    def __init__(self, directory: Path, database: str, port: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.engine = Engine(directory, database)
        directory.mkdir(parents=True, exist_ok=True)
        self.engine.prepare()
        self.owner = chdb.connect(self.engine.connection)  # the first handle fixes the rights


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        """Answer /ping, or a query in the URL."""
        if self.path == "/ping":
            self.reply(200, b"Ok.\n")
        else:
            self.do_POST()

    def do_POST(self) -> None:
        """Run a statement or an insert."""
        given = dict(parse_qsl(urlsplit(self.path).query, keep_blank_values=True))
        try:
            body = inflated(body_of(self), self.headers.get("Content-Encoding", ""))
        except BodyCutError:
            self.close_connection = True
            return
        statement = f"{given.get('query', '')}\n".encode() + body
        handle = chdb.connect(self.server.engine.connection)
        try:
            self.reply(200, self.run(handle, statement, given))
        except RuntimeError as error:
            text = str(error)
            text = text[max(text.find("Code: "), 0) :]
            code = re.match(r"Code: (\d+)", text)
            self.reply(500, text.encode(), {"X-ClickHouse-Exception-Code": code[1] if code else "1002"})
        finally:
            handle.close()

    def run(self, handle: Any, statement: bytes, given: dict[str, str]) -> bytes:
        """Return the answer's bytes; raises RuntimeError with ClickHouse's words."""
        if not statement.strip():
            return b"Ok.\n"
        if given.get("database", "default") != "default":
            handle.query(f"USE `{given['database']}`")
        for name, value in given.items():
            if name not in TRANSPORT and not name.startswith("param_") and re.fullmatch(r"\w+", name):
                handle.query(f"SET {name} = '{value}'")
        insert = INSERT.match(statement)
        if insert and insert[2].upper() != b"VALUES":
            with tempfile.NamedTemporaryFile(suffix=".native") as file:
                file.write(statement[insert.end() :])
                file.flush()
                handle.query(f"{insert[1].decode()} FROM INFILE '{file.name}' FORMAT {insert[2].decode()}")
            return b""
        parameters = {name[6:]: value for name, value in given.items() if name.startswith("param_")}
        form = given.get("default_format") or self.headers.get("X-ClickHouse-Format") or "TabSeparated"
        return handle.query(statement.decode(), form, params=parameters).bytes() or b""

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        """Send an answer."""
        self.send_response(status)
        said = {"X-ClickHouse-Timezone": "UTC", "X-ClickHouse-Summary": json.dumps({"written_rows": "0"})}
        for name, value in {**said, **(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def main() -> None:
    """Serve until killed."""
    server = Server(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main()
