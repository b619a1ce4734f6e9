"""Record batches made by hand and produced as they are: what aiokafka's own producer would refuse to write.

The layout is Kafka's record batch, version 2. The bytes of the records are whatever they are given as.
"""

from __future__ import annotations

import struct
import time
from typing import TYPE_CHECKING, Final

from aiokafka import TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import for_code
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record.util import calc_crc32c

if TYPE_CHECKING:
    from collections.abc import Sequence

CODECS: Final = {"none": 0, "gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}
ANSWER_MS: Final = 10_000


def record(
    value: bytes | None, headers: Sequence[tuple[bytes, bytes]] = (), *, key: bytes | None = b"k", nth: int = 0
) -> bytes:
    """Return one record with header names of any bytes; `nth` is its place in its batch."""
    body = bytearray(b"\x00") + varint(0) + varint(nth) + _sized(key) + _sized(value) + varint(len(headers))
    for name, content in headers:
        body += _sized(name) + _sized(content)
    return bytes(varint(len(body)) + body)


def batch(records: bytes, count: int = 1, codec: str = "none") -> bytes:
    """Return a batch around bytes that are said to be `count` records, compressed with a codec."""
    now_ms = int(time.time() * 1_000)
    rest = struct.pack(">hiqqqhii", CODECS[codec], count - 1, now_ms, now_ms, -1, -1, -1, count) + records
    return struct.pack(">qiibI", 0, len(rest) + 9, -1, 2, calc_crc32c(rest)) + rest


async def produce(bootstrap_servers: str, topic: str, partition: int, raw: bytes) -> int:
    """Write a batch to a partition and return its offset; raises the KafkaError that the broker answers with."""
    client = AIOKafkaClient(bootstrap_servers=bootstrap_servers)
    await client.bootstrap()
    try:
        await client.set_topics([topic])
        leader = client.cluster.leader_for_partition(TopicPartition(topic, partition))
        if leader is None:
            raise LookupError(f"{topic}/{partition} has no leader")
        request = ProduceRequest(None, -1, ANSWER_MS, [(topic, [(partition, raw)])])
        answer = await client.send(leader, request)
    finally:
        await client.close()
    ((_, ((_, code, offset, *_rest),)),) = answer.topics
    if code:
        raise for_code(code)(f"{topic}/{partition}: {_rest}")
    return int(offset)


def varint(number: int) -> bytes:
    """Return a number in the zigzag form of Kafka's records."""
    left, out = (number << 1) ^ (number >> 63), bytearray()
    while left > 0x7F:
        out.append(0x80 | (left & 0x7F))
        left >>= 7
    out.append(left)
    return bytes(out)


def _sized(content: bytes | None) -> bytes:
    return varint(-1) if content is None else varint(len(content)) + content
