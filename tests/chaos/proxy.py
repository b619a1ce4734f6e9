"""A TCP proxy on 127.0.0.1 that can be cut: connections reset, or left open and silent."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Literal

CHUNK_BYTES = 65_536
CONNECTIONS_MAX = 1_000


class Proxy:
    """Forwards one port to another until it is cut."""

    def __init__(self, port: int, target_port: int) -> None:
        """Listen on `port` once started; forward to `target_port`."""
        self._port, self._target = port, target_port
        self._through = asyncio.Event()
        self._through.set()
        self._refusing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)

    async def stop(self) -> None:
        """Close everything."""
        if self._server is not None:
            self._server.close()
        self._reset()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self, how: Literal["reset", "silent"]) -> None:
        """Reset all connections and refuse new ones, or let no byte through any more."""
        if how == "reset":
            self._refusing = True
            self._reset()
        else:
            self._through.clear()

    def mend(self) -> None:
        """Forward again."""
        self._refusing = False
        self._through.set()

    def _reset(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if self._refusing or task is None or len(self._tasks) >= CONNECTIONS_MAX:
            writer.transport.abort()
            return
        self._tasks.add(task)
        try:
            beyond_reader, beyond_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            self._tasks.discard(task)
            writer.transport.abort()
            return
        ways = [
            asyncio.create_task(self._pump(reader, beyond_writer)),
            asyncio.create_task(self._pump(beyond_reader, writer)),
        ]
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            self._tasks.discard(task)
            for end in (writer, beyond_writer):
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                await self._through.wait()
                writer.write(data)
                await writer.drain()
