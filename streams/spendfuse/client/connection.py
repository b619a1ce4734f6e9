"""From `BrokerSettings` to what aiokafka's clients take. The result may hold a password: never log or print it."""

import asyncio
from typing import Any, Final

from aiokafka import AIOKafkaConsumer  # noqa: TID251 - made safe below, for everybody else
from aiokafka.helpers import create_ssl_context
from aiokafka.protocol.fetch import FetchRequest

from spendfuse.client.batches import readable
from spendfuse.settings import BrokerSettings
from spendfuse.wire.topics import MESSAGE_BYTES_MAX

REQUEST_TIMEOUT_MS: Final = 10_000
"""Longest a request, or a record waiting in a producer, takes before it fails and is tried anew."""
RETRY_BACKOFF_MS: Final = 100
CLOSE_S_MAX: Final = 15.0
"""Longest a client's end is waited for: what a producer still holds is sent, or has failed, by then."""
METADATA_AGE_MS_MAX: Final = 60_000


def client_options(broker: BrokerSettings, client_id: str) -> dict[str, Any]:
    """Return what every aiokafka client takes: servers, security and the bounds of a request.

    Raises OSError (and its ssl.SSLError) when the CA file cannot be read.
    """
    options: dict[str, Any] = {
        "bootstrap_servers": broker.bootstrap_servers,
        "client_id": client_id,
        "security_protocol": broker.security_protocol,
        "request_timeout_ms": REQUEST_TIMEOUT_MS,
        "retry_backoff_ms": RETRY_BACKOFF_MS,
        "metadata_max_age_ms": METADATA_AGE_MS_MAX,
    }
    if broker.security_protocol in ("SSL", "SASL_SSL"):
        options["ssl_context"] = create_ssl_context(cafile=broker.ssl_cafile or None)
    if broker.security_protocol in ("SASL_PLAINTEXT", "SASL_SSL"):
        options["sasl_mechanism"] = broker.sasl_mechanism
        options["sasl_plain_username"] = broker.sasl_username
        options["sasl_plain_password"] = broker.sasl_password.get_secret_value()
    return options


def admin_options(broker: BrokerSettings, client_id: str) -> dict[str, Any]:
    """Return the keyword arguments of an `AIOKafkaAdminClient`."""
    return client_options(broker, client_id)


def producer_options(broker: BrokerSettings, client_id: str) -> dict[str, Any]:
    """Return the keyword arguments of an `AIOKafkaProducer` that waits for every replica and lingers for nothing."""
    return {
        **client_options(broker, client_id),
        "acks": "all",
        "linger_ms": 0,
        "max_batch_size": broker.producer_max_batch_size,
        "max_request_size": MESSAGE_BYTES_MAX,
    }


def consumer_options(broker: BrokerSettings, client_id: str) -> dict[str, Any]:
    """Return the keyword arguments of an `AIOKafkaConsumer` that starts at the beginning and commits nothing itself.

    The session, rebalance and heartbeat timings matter only with a `group_id`.
    """
    return {
        **client_options(broker, client_id),
        "auto_offset_reset": "earliest",
        "enable_auto_commit": False,
        "fetch_max_wait_ms": broker.fetch_max_wait_ms,
        "session_timeout_ms": broker.session_timeout_ms,
        "rebalance_timeout_ms": broker.rebalance_timeout_ms,
        "heartbeat_interval_ms": broker.heartbeat_interval_ms,
    }


async def close(end: Any, within_s: float = CLOSE_S_MAX) -> None:
    """Stop a consumer or producer and wait no longer than `within_s`: with a fetch on its way aiokafka may never end.

    What hangs may swallow a cancellation too, so that is not waited for. An error of a stop matters to nobody.
    """
    closing = asyncio.ensure_future(end.stop())
    closing.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # seen, or asyncio complains
    done, _ = await asyncio.wait({closing}, timeout=within_s)
    if not done:
        closing.cancel()


class Consumer(AIOKafkaConsumer):  # type: ignore[misc]  # aiokafka ships no types
    """A consumer that no record batch can stop or lead astray; every one of ours is made as this."""

    def __init__(self, *topics: str, **options: Any) -> None:
        """Take what aiokafka's takes."""
        super().__init__(*topics, **options)
        read_anything(self)


def read_anything(consumer: Any) -> None:
    """Have a consumer's fetches pass through `batches.readable`, before it has started; a second time does nothing."""
    client = consumer._client  # noqa: SLF001 - aiokafka has no hook between what is fetched and what is read
    send = client.send
    if getattr(send, "reads_anything", False):
        return

    async def readable_send(node_id: Any, request: Any, **options: Any) -> Any:
        answer = await send(node_id, request, **options)
        if isinstance(request, FetchRequest):
            answer.topics = [
                (topic, [(*partition[:-1], readable(partition[-1] or b"")) for partition in partitions])
                for topic, partitions in answer.topics
            ]
        return answer

    readable_send.reads_anything = True  # type: ignore[attr-defined]  # a mark on a function
    client.send = readable_send
