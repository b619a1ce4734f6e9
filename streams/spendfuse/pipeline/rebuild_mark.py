"""The mark that a rebuild of the tables leaves in Kafka: a half-written one must not pass for state.

A compacted topic of the app's own holds it, under one key. While its phase is `writing` no worker starts. `former` says
what was taken over from another Kafka: for each ledger partition of the trail, the last whole batch then.
"""

from typing import Any, Final, Literal

from aiokafka import TopicPartition
from pydantic import BaseModel, ConfigDict, ValidationError

KEY: Final = b"rebuild"
READ_MS: Final = 2_000
Source = Literal["ledger", "clickhouse"]


class RebuildMark(BaseModel):
    """What a rebuild is doing, or has done; `former_us` is when another Kafka's sums were taken over, 0 if never."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    v: Literal[1] = 1
    phase: Literal["writing", "done"]
    source: Source
    at_us: int
    former: dict[int, int] = {}
    former_us: int = 0


def mark_topic(app_id: str) -> str:
    """Return the topic of an app's mark."""
    return f"{app_id}-rebuild"


async def read_mark(consumer: Any, app_id: str) -> RebuildMark | None:
    """Return the last mark, None where the topic holds none; the topic must exist.

    Raises `ValueError` for a record that is no mark.
    """
    place = TopicPartition(mark_topic(app_id), 0)
    consumer.assign([place])
    await consumer.seek_to_beginning(place)
    last: bytes | None = None
    # A batch may hold less than what is there, and the embedded broker's end is not to be trusted: read until nothing.
    while batches := await consumer.getmany(place, timeout_ms=READ_MS):
        last = batches[place][-1].value
        if (consumer.highwater(place) or 0) <= batches[place][-1].offset + 1:
            break
    if last is None:
        return None
    try:
        return RebuildMark.model_validate_json(last)
    except ValidationError as error:
        raise ValueError(f"{mark_topic(app_id)} holds a record that is no mark of a rebuild") from error
