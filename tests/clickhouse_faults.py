"""An HTTP proxy on 127.0.0.1 in front of a ClickHouse server, which fails inserts as servers and networks do.

It takes a request whole before it does anything, so each fault happens at a known moment: before the server has seen
the insert, or after it was carried out and before the answer is back.
"""

from __future__ import annotations

import http.client
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Literal

from clickhouse_server import BodyCutError, body_of, inflated

if TYPE_CHECKING:
    from collections.abc import Callable

Fault = Literal["pass", "lose request", "lose answer", "slow", "crash"]
FORWARD_S_MAX = 60.0
CODES = {
    159: "TIMEOUT_EXCEEDED",
    202: "TOO_MANY_SIMULTANEOUS_QUERIES",
    241: "MEMORY_LIMIT_EXCEEDED",
    242: "TABLE_IS_READ_ONLY",
    243: "NOT_ENOUGH_SPACE",
    252: "TOO_MANY_PARTS",
}


@dataclass(frozen=True)
class Step:
    """What happens to one insert: a fault, or an exception of the server's by its code."""

    fault: Fault = "pass"
    code: int = 0


class Faults:
    """The proxy: `plan` says what happens to each insert into a table; away, nobody answers anything."""

    def __init__(self, target_port: int, port: int) -> None:
        """Listen on `port`; forward to `target_port`."""
        self.port = port
        self.target_port = target_port
        self.plan: Callable[[str, int], Step] = lambda _table, _nth: Step()
        self.crash: Callable[[], None] = lambda: None
        self.slow_s = 0.0
        self.happened: list[str] = []
        self._inserts: dict[str, int] = {}
        self._lock = threading.Lock()
        self._server: _Server | None = None

    def start(self) -> None:
        """Listen, also again after `away`."""
        self._server = _Server(self)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def away(self) -> None:
        """Listen no more: connections are refused."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def step(self, table: str) -> Step:
        """Return what happens to the next insert into a table."""
        with self._lock:
            nth = self._inserts.get(table, 0)
            self._inserts[table] = nth + 1
            step = self.plan(table, nth)
            if step != Step():
                self.happened.append(f"{step.fault if not step.code else step.code} {table}")
        return step


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, faults: Faults) -> None:
        super().__init__(("127.0.0.1", faults.port), _Handler)
        self.faults = faults
        self.gone = False

    def server_close(self) -> None:
        self.gone = True
        super().server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._take()

    def do_POST(self) -> None:
        self._take()

    def _take(self) -> None:
        faults = self.server.faults
        try:
            body = body_of(self)
        except BodyCutError:
            self.close_connection = True
            return
        if self.server.gone:  # a connection of before, kept alive
            self.close_connection = True
            return
        table = _table(inflated(body, self.headers.get("Content-Encoding", "")))
        step = faults.step(table) if table else Step()
        if step.code:
            self._refuse(step.code)
            return
        if step.fault in ("lose request", "crash"):
            if step.fault == "crash":
                threading.Thread(target=self._forward, args=(body,), daemon=True).start()
                faults.crash()
            self.close_connection = True
            return
        status, headers, answer = self._forward(body)
        if step.fault == "lose answer":
            self.close_connection = True
            return
        if step.fault == "slow":
            time.sleep(faults.slow_s)
        self._reply(status, headers, answer)

    def _refuse(self, code: int) -> None:
        text = f"Code: {code}. DB::Exception: said by a test. ({CODES[code]})"
        self._reply(503 if code == 202 else 500, {"X-ClickHouse-Exception-Code": str(code)}, text.encode())

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        beyond = http.client.HTTPConnection("127.0.0.1", self.server.faults.target_port, timeout=FORWARD_S_MAX)
        skipped = {"transfer-encoding", "content-length", "host", "connection"}
        headers = {name: value for name, value in self.headers.items() if name.lower() not in skipped}
        try:
            beyond.request(self.command, self.path, body, headers)
            answer = beyond.getresponse()
            kept = {name: value for name, value in answer.getheaders() if name.lower().startswith("x-clickhouse")}
            return answer.status, kept, answer.read()
        except OSError:
            return 502, {}, b"the server behind the proxy is away"
        finally:
            beyond.close()

    def _reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        try:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        except OSError:  # the client did not wait
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _table(body: bytes) -> str:
    """Return the table of an insert; '' for anything else."""
    words = body[:200].split()
    if [word.upper() for word in words[:2]] != [b"INSERT", b"INTO"]:
        return ""
    return words[2].decode(errors="replace").replace("`", "").rpartition(".")[2]
