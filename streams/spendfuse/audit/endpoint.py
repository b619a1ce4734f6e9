"""ClickHouse's HTTP protocol over the embedded engine: loopback only, one read-only user, everything bounded.

The unmodified clickhouse-connect HTTP clients, sync and async, work against it (query, binds, streams, gzip). Source:
ClickHouse HTTP interface documentation; what the clients send was read in clickhouse-connect 1.12 and clickhouse-go.
"""

import asyncio
import base64
import contextlib
import dataclasses
import hmac
import json
import re
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from aiohttp import web

from spendfuse.audit import native_hello, readonly
from spendfuse.audit.address import READER, Address
from spendfuse.audit.database import Engine
from spendfuse.audit.readonly import Answer, Query, QueryRefusedError

HOST: Final = "127.0.0.1"
QUERIES_MAX: Final = 4
WAITING_MAX: Final = 32
BODY_BYTES_MAX: Final = 1_048_576
PARAMETERS_MAX: Final = 1_000
ANSWER_S_MAX: Final = readonly.QUERY_S_MAX + 5
SHUTDOWN_S: Final = 2.0
DISPLAY_NAME: Final = "spendfuse-embedded"

AUTHENTICATION_FAILED: Final = 516
TOO_MANY_SIMULTANEOUS_QUERIES: Final = 202
TIMEOUT_EXCEEDED: Final = 159
BAD_ARGUMENTS: Final = 36
_STATUS: Final = {
    BAD_ARGUMENTS: 400,
    readonly.SYNTAX_ERROR: 400,
    readonly.READONLY: 403,
    497: 403,  # ACCESS_DENIED
    AUTHENTICATION_FAILED: 403,
    60: 404,  # UNKNOWN_TABLE
    readonly.UNKNOWN_DATABASE: 404,
    TOO_MANY_SIMULTANEOUS_QUERIES: 503,
    TIMEOUT_EXCEEDED: 504,
}
# What the transport itself consumes; every other key of the URL is a setting.
_TRANSPORT: Final = frozenset({
    "query", "database", "user", "password", "session_id", "session_timeout", "session_check", "query_id", "quota_key",
    "compress", "decompress", "wait_end_of_query", "client_protocol_version", "role", "default_format", "buffer_size",
    "enable_http_compression",
})  # fmt: skip
_FORMAT_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9]{0,63}")
_PARAMETER: Final = "param_"
_ON: Final = frozenset({"1", "true"})


class Endpoint:
    """The HTTP server in the process that owns the embedded engine."""

    def __init__(self, engine: Engine, token: str, port: int) -> None:
        """Serve an engine that is open; port 0 picks a free one."""
        if not token:
            raise ValueError("the endpoint needs a token")
        self._engine = engine
        self._token = token
        self._port = port
        self._executor = ThreadPoolExecutor(QUERIES_MAX, thread_name_prefix="spendfuse-query")
        self._free = asyncio.Semaphore(QUERIES_MAX)
        self._waiting = 0
        self._runner: web.AppRunner | None = None

    async def start(self) -> Address:
        """Listen, and return where; raises OSError when the port is taken."""
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        app.router.add_get("/ping", self._ping)
        for method in ("GET", "POST"):
            app.router.add_route(method, "/", self._query)
        # Neither access log nor error pages: a URL may hold parameters.
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S)
        await self._runner.setup()
        await web.TCPSite(self._runner, HOST, self._port).start()
        port = self._runner.addresses[0][1]
        return Address.model_validate(
            {"url": f"http://{HOST}:{port}", "user": READER, "database": self._engine.database, "token": self._token}
        )

    async def stop(self) -> None:
        """Stop listening, and wait for the queries that run (each ends by itself at its time limit)."""
        if self._runner is not None:
            await self._runner.cleanup()
        await asyncio.to_thread(self._executor.shutdown, wait=True, cancel_futures=True)

    async def _ping(self, _request: web.Request) -> web.Response:
        return web.Response(text="Ok.\n")

    async def _query(self, request: web.Request) -> web.Response:
        query_id = str(uuid.uuid4())
        try:
            self._authenticate(request)
            query = await self._read(request)
            if not query.statement.strip():
                return web.Response(text="Ok.\n")
            answer = await self._answer(query)
            if query.is_hello:
                (version,) = answer.body.decode().split()
                body = native_hello.hello(DISPLAY_NAME, version, "UTC")
                answer = dataclasses.replace(answer, body=body, output_format="Native")
        except QueryRefusedError as error:
            return _refusal(error, query_id)
        response = _response(answer, query_id)
        if query.gzip and "gzip" in request.headers.get("Accept-Encoding", ""):
            response.enable_compression(web.ContentCoding.gzip)
        return response

    def _authenticate(self, request: web.Request) -> None:
        user, key = request.headers.get("X-ClickHouse-User", ""), request.headers.get("X-ClickHouse-Key", "")
        scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "basic":
            with contextlib.suppress(ValueError):
                user, _, key = base64.b64decode(credentials, validate=True).decode().partition(":")
        # Both are compared, and as bytes: neither the time taken nor a strange letter tells anything.
        right = hmac.compare_digest(key.encode(errors="replace"), self._token.encode())
        if not (hmac.compare_digest(user.encode(errors="replace"), READER.encode()) and right):
            raise QueryRefusedError(AUTHENTICATION_FAILED, f"give user {READER} and the token of the audit process")

    async def _read(self, request: web.Request) -> Query:
        values = dict(request.query)
        if request.content_type == "multipart/form-data":
            form = await request.post()
            for name, value in form.items():
                if not isinstance(value, str):
                    raise QueryRefusedError(BAD_ARGUMENTS, "external data is not supported here")
                values[name] = value
            body = ""
        else:
            try:
                body = (await request.read()).decode()
            except UnicodeDecodeError as error:
                raise QueryRefusedError(BAD_ARGUMENTS, "the statement is not UTF-8") from error
        if len(values) > PARAMETERS_MAX:
            raise QueryRefusedError(BAD_ARGUMENTS, f"more than {PARAMETERS_MAX} parameters")
        if _ON & {values.get("compress", ""), values.get("decompress", "")}:
            raise QueryRefusedError(
                BAD_ARGUMENTS, "compress and decompress are not supported here: use gzip, or nothing"
            )
        output_format = values.get("default_format") or request.headers.get("X-ClickHouse-Format") or "TabSeparated"
        if not _FORMAT_NAME.fullmatch(output_format):
            raise QueryRefusedError(BAD_ARGUMENTS, "the output format is not a name")
        statement = f"{values.get('query', '')}\n{body}".strip()
        # clickhouse-go says its protocol's version; any other client wants the ordinary answer.
        greets = "client_protocol_version" in values and native_hello.is_hello(statement)
        return Query(
            statement="SELECT version()" if greets else statement,
            parameters={key[len(_PARAMETER) :]: value for key, value in values.items() if key.startswith(_PARAMETER)},
            settings={
                key: value for key, value in values.items() if key not in _TRANSPORT and not key.startswith(_PARAMETER)
            },
            database=values.get("database") or request.headers.get("X-ClickHouse-Database") or self._engine.database,
            output_format="TabSeparated" if greets else output_format,
            is_hello=greets,
            gzip=values.get("enable_http_compression") in _ON,
        )

    async def _answer(self, query: Query) -> Answer:
        if self._waiting >= WAITING_MAX:
            raise QueryRefusedError(TOO_MANY_SIMULTANEOUS_QUERIES, f"more than {WAITING_MAX} queries wait: try again")
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
        # The slot is free when the engine has ended, even if nobody waits for the answer any more.
        future = asyncio.get_running_loop().run_in_executor(self._executor, readonly.run, self._engine, query)
        future.add_done_callback(self._release)
        try:
            return await asyncio.wait_for(asyncio.shield(future), ANSWER_S_MAX)
        except TimeoutError as error:
            raise QueryRefusedError(TIMEOUT_EXCEEDED, f"no answer within {ANSWER_S_MAX} s: ask for less") from error

    def _release(self, future: asyncio.Future[Answer]) -> None:
        self._free.release()
        if not future.cancelled():
            future.exception()  # seen, or asyncio complains when the client has gone


def _refusal(error: QueryRefusedError, query_id: str) -> web.Response:
    text = str(error)
    if not text.startswith("Code: "):
        text = f"Code: {error.code}. DB::Exception: {text}"
    headers = {"X-ClickHouse-Exception-Code": str(error.code), "X-ClickHouse-Query-Id": query_id}
    return web.Response(status=_STATUS.get(error.code, 500), text=text + "\n", headers=headers)


def _response(answer: Answer, query_id: str) -> web.Response:
    summary = {
        "read_rows": str(answer.rows_read),
        "read_bytes": str(answer.bytes_read),
        "written_rows": "0",
        "elapsed_ns": str(answer.elapsed_ns),
    }
    headers = {
        "Content-Type": "application/octet-stream",
        "X-ClickHouse-Query-Id": query_id,
        "X-ClickHouse-Server-Display-Name": DISPLAY_NAME,
        "X-ClickHouse-Timezone": "UTC",
        "X-ClickHouse-Format": answer.output_format,
        "X-ClickHouse-Summary": json.dumps(summary),
    }
    return web.Response(body=answer.body, headers=headers)
