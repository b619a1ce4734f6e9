"""A bounded buffer and the task that empties it to Kafka, in order, whatever becomes of the broker."""

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, NamedTuple, TypeVar

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError

from spendfuse.client.background import BACKGROUND
from spendfuse.client.connection import close, producer_options
from spendfuse.settings import BrokerSettings

ROUND_ITEMS_MAX: Final = 2_000
"""Most items taken for one round of sends; they are held beside the buffer until sent."""
BACKOFF_S_MIN: Final = 0.05
BACKOFF_S_MAX: Final = 2.0
CONNECT_TIMEOUT_S: Final = 15.0
DISCONNECT_TIMEOUT_S: Final = 1.0
LOG_INTERVAL_S: Final = 30.0
"""A broker that stays away is said so often, not at every attempt."""
CLOSE_MARGIN_S: Final = 2.0

T = TypeVar("T")
_log = logging.getLogger("spendfuse")


class Message(NamedTuple, Generic[T]):
    """One Kafka message and the items it carries."""

    key: bytes
    value: bytes
    headers: list[tuple[str, bytes]]
    items: Sequence[T]


class Counts(NamedTuple):
    """What became of everything put: `put == sent + dropped + buffered`; `send_errors` counts failed attempts."""

    put: int
    sent: int
    dropped: int
    buffered: int
    send_errors: int


class Outbox(Generic[T]):
    """Takes items from any thread at once, and sends them from the background thread.

    Items are packed by `pack` after lingering; messages of one key are sent one after the other, so their order
    holds. When the buffer is full the oldest waiting item is dropped, and counted. A failed send is tried again
    until it succeeds: Kafka may then hold a message twice, and readers drop the second by its ids. A message that the
    topic does not take for its size goes as two; an item too large by itself is dropped, counted and said.
    The topic must exist: it is waited for, never created by accident with a broker's default partitions.
    """

    def __init__(
        self,
        broker: BrokerSettings,
        topic: str,
        pack: Callable[[list[T]], list[Message[T]]],
        *,
        client_id: str,
        buffer_max: int,
        linger_s: float,
    ) -> None:
        self._broker = broker
        self._topic = topic
        self._pack = pack
        self._client_id = client_id
        self._buffer_max = buffer_max
        self._linger_s = linger_s
        self._error_said_at = float("-inf")
        self._start_anew()

    def _start_anew(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting: deque[T] = deque()
        self._in_flight = 0
        self._put = self._sent = self._dropped = self._send_errors = 0
        self._hurry = False
        self._closed = False
        self._asleep = False
        self._wake: asyncio.Event | None = None
        self._running: concurrent.futures.Future[None] | None = None
        self._producer: Any = None

    # -- any thread ------------------------------------------------------------------------------------------------

    def put(self, item: T) -> bool:
        """Take an item; never waits for the broker. Returns False if the outbox is closed: the item is dropped."""
        with self._lock:
            self._put += 1
            if self._closed:
                self._dropped += 1
                return False
            self._waiting.append(item)
            if len(self._waiting) > self._buffer_max:
                self._waiting.popleft()
                self._dropped += 1
            # The sender is woken only if it sleeps: a wake-up costs a system call.
            wake, self._asleep = self._asleep, False
            start = self._running is None
            if start:
                self._running = concurrent.futures.Future()  # a place held, so that nobody else starts one
        if start:
            self._start_sender()
        elif wake:
            self._wake_sender()
        return True

    def counts(self) -> Counts:
        """Return what became of everything put."""
        with self._lock:
            buffered = len(self._waiting) + self._in_flight
            return Counts(self._put, self._sent, self._dropped, buffered, self._send_errors)

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing is buffered; return whether that came about within `timeout_s`."""
        give_up_at = time.monotonic() + timeout_s
        with self._changed:
            self._hurry = True
            self._asleep = False
        self._wake_sender()
        with self._changed:
            while self._waiting or self._in_flight:
                left_s = give_up_at - time.monotonic()
                if left_s <= 0:
                    return False
                self._changed.wait(left_s)
        return True

    def close(self, timeout_s: float) -> bool:
        """Flush, then end the sender and count as dropped what it could not send; return whether all was sent."""
        flushed = self.flush(timeout_s)
        with self._lock:
            already, self._closed = self._closed, True
            running, self._running = self._running, None
            self._hurry = True
        if already:
            return flushed
        if running is not None:
            running.cancel()
            with contextlib.suppress(Exception, concurrent.futures.CancelledError):
                BACKGROUND.spawn(self._disconnect()).result(DISCONNECT_TIMEOUT_S + CLOSE_MARGIN_S)
        with self._lock:
            self._dropped += len(self._waiting) + self._in_flight
            self._waiting.clear()
            self._in_flight = 0
            self._changed.notify_all()
        return flushed

    def forked(self) -> None:
        """Forget what is buffered (the parent sends it) and the connection: this is a forked child."""
        closed = self._closed
        BACKGROUND.abandon((self._producer, self._wake, self._running))
        self._start_anew()
        self._closed = closed

    def _start_sender(self) -> None:
        try:
            running = BACKGROUND.spawn(self._send_for_ever())
        except RuntimeError as error:  # no thread can be started just now, or at the very end of a process
            _log.warning("spendfuse cannot send to %s: %s", self._topic, error)
            with self._lock:
                self._running = None  # the next item tries again
            return
        with self._lock:
            if self._closed:
                running.cancel()
            else:
                self._running = running

    def _wake_sender(self) -> None:
        wake = self._wake
        if wake is not None:
            with contextlib.suppress(RuntimeError):  # the background has ended
                BACKGROUND.loop().call_soon_threadsafe(wake.set)

    # -- the background thread -------------------------------------------------------------------------------------

    async def _send_for_ever(self) -> None:
        self._wake = asyncio.Event()
        backoff_s = BACKOFF_S_MIN
        while True:
            await self._wait_for_items()
            try:
                await self._connect()
                await self._send_round()
                backoff_s = BACKOFF_S_MIN
            except Exception as error:  # noqa: BLE001 - whatever it is, the items stay and are tried again
                self._failed(error, backoff_s)
                await self._disconnect()
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, BACKOFF_S_MAX)

    async def _wait_for_items(self) -> None:
        wake = self._wake
        if wake is None:
            raise RuntimeError("the sender waits before it has started")
        was_idle = False
        while True:
            with self._lock:
                wake.clear()
                if self._waiting:
                    hurry = self._hurry
                    break
                self._hurry = False
                self._asleep = was_idle = True
            await wake.wait()
        # What finds the sender idle goes at once: it may be the usage that crosses a cap. What comes meanwhile is
        # collected.
        if self._linger_s > 0 and not hurry and not was_idle:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(wake.wait(), self._linger_s)

    async def _connect(self) -> None:
        if self._producer is not None:
            return
        producer = AIOKafkaProducer(**producer_options(self._broker, self._client_id))
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await producer.start()
                cluster = await producer.client.fetch_all_metadata()
                if not cluster.partitions_for_topic(self._topic):
                    raise KafkaError(f"topic {self._topic} does not exist; a spendfuse worker creates it")  # noqa: TRY301 - the cleanup below is the same for any fault
        except BaseException:
            await close(producer, DISCONNECT_TIMEOUT_S)
            raise
        self._producer = producer

    async def _disconnect(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            await close(producer, DISCONNECT_TIMEOUT_S)

    async def _send_round(self) -> None:
        with self._lock:
            taken = [self._waiting.popleft() for _ in range(min(len(self._waiting), ROUND_ITEMS_MAX))]
            self._in_flight = len(taken)
        queues: dict[bytes, deque[Message[T]]] = {}
        try:
            for message in self._pack(taken):
                queues.setdefault(message.key, deque()).append(message)
        except BaseException:
            self._put_back(taken)
            raise
        try:
            sends = (self._send_in_order(queue) for queue in queues.values())
            results = await asyncio.gather(*sends, return_exceptions=True)
        finally:
            self._put_back([item for queue in queues.values() for message in queue for item in message.items])
        for result in results:
            if isinstance(result, asyncio.CancelledError):  # by the producer's end, not ours
                raise KafkaError("the producer closed") from result
            if result is not None:
                raise result

    async def _send_in_order(self, queue: deque[Message[T]]) -> None:
        while queue:
            message = queue[0]
            try:
                await self._producer.send_and_wait(self._topic, message.value, message.key, headers=message.headers)
            except MessageSizeTooLargeError:
                queue.popleft()
                queue.extendleft(reversed(self._halves(message)))
                continue
            queue.popleft()
            with self._changed:
                self._sent += len(message.items)
                self._in_flight -= len(message.items)
                self._changed.notify_all()

    def _halves(self, message: Message[T]) -> list[Message[T]]:
        """Return a message that the broker will never take as two; one of a single item is dropped, and said."""
        if len(message.items) > 1:
            half = len(message.items) // 2
            return [*self._pack(list(message.items[:half])), *self._pack(list(message.items[half:]))]
        with self._changed:
            self._dropped += 1
            self._in_flight -= 1
            self._changed.notify_all()
        _log.error(
            "spendfuse dropped a message of %d bytes: larger than %s takes (max.message.bytes)",
            *(len(message.value), self._topic),
        )
        return []

    def _put_back(self, unsent: list[T]) -> None:
        with self._changed:
            if self._closed:  # they are counted by close()
                return
            self._waiting.extendleft(reversed(unsent))
            self._in_flight = 0
            while len(self._waiting) > self._buffer_max:
                self._waiting.popleft()
                self._dropped += 1
            self._changed.notify_all()

    def _failed(self, error: BaseException, backoff_s: float) -> None:
        with self._lock:
            self._send_errors += 1
            buffered = len(self._waiting)
        now = time.monotonic()
        if now - self._error_said_at >= LOG_INTERVAL_S:
            self._error_said_at = now
            _log.warning(
                "spendfuse cannot send to %s at %s: %s; %d kept, trying again in %.2f s",
                *(self._topic, self._broker.bootstrap_servers, error, buffered, backoff_s),
            )
