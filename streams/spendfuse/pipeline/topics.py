"""Topics created with explicit settings, and a refusal when what exists is something else."""

import asyncio
from collections.abc import Iterable
from typing import Final, NamedTuple

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import TopicAlreadyExistsError, for_code

from spendfuse.client.connection import admin_options
from spendfuse.settings import BrokerSettings
from spendfuse.wire.topics import TOPICS, Topic

CLIENT_ID: Final = "spendfuse-topics"
CHANGELOG_CONFIGS: Final = {
    "cleanup.policy": "compact",
    "segment.bytes": str(16 * 1_048_576),
    "min.cleanable.dirty.ratio": "0.2",
    "min.compaction.lag.ms": "120000",
}
"""Settings of the tables' changelogs. The segment that is written to is never compacted, and a restart reads all of it:
by default that is 1 GiB of a partition, however few keys it has. Nothing is compacted for two minutes, so that a record
which arrives late from a former owner does not remove what is newer (`faust_cures`, 4)."""
TABLES: Final = ("scopes", "ids", "shared")
VISIBLE_S_MAX: Final = 30.0
"""Longest until a topic that was made is in what brokers say of it."""
LOOK_AGAIN_S: Final = 0.1
TOPIC_ALREADY_EXISTS: Final = TopicAlreadyExistsError.errno


class TopicMismatchError(Exception):
    """A topic exists with another partition count: usage would be routed wrongly, so nothing may run on it."""


class TopicReport(NamedTuple):
    """One topic of the table: how many partitions it has, and whether this call made it."""

    topic: Topic
    partitions: int
    created: bool


def partitions_of(topic: Topic, partitions: int) -> int:
    """Return the partition count of a topic in a deployment of `partitions`."""
    return topic.partitions or partitions


async def ensure_topics(broker: BrokerSettings, *, partitions: int, replication: int) -> list[TopicReport]:
    """Create the topics that are missing and check the others.

    Raises `TopicMismatchError` for a wrong partition count, a `KafkaError` when the broker refuses or is away.
    """
    admin = AIOKafkaAdminClient(**admin_options(broker, CLIENT_ID))
    await admin.start()
    try:
        existing = await _partition_counts(admin, [topic.name for topic in TOPICS])
        missing = [topic for topic in TOPICS if topic.name not in existing]
        if missing:
            await _create(
                admin,
                [
                    NewTopic(
                        name=topic.name,
                        num_partitions=partitions_of(topic, partitions),
                        replication_factor=replication,
                        topic_configs=topic.configs(),
                    )
                    for topic in missing
                ],
            )
            existing |= await _partition_counts(admin, [topic.name for topic in missing])
    finally:
        await admin.close()
    created = {topic.name for topic in missing}
    faults = [
        f"{topic.name} has {existing[topic.name]} partitions, and this deployment wants {wanted}"
        for topic in TOPICS
        if topic.name in existing and existing[topic.name] != (wanted := partitions_of(topic, partitions))
    ]
    if faults:
        raise TopicMismatchError(
            "; ".join(faults) + ". Set SPENDFUSE_PARTITIONS to what exists, or use another cluster or new topics"
        )
    return [
        TopicReport(topic, existing.get(topic.name, partitions_of(topic, partitions)), topic.name in created)
        for topic in TOPICS
    ]


async def ensure_changelogs(broker: BrokerSettings, app_id: str, *, partitions: int, replication: int) -> None:
    """Create the tables' changelogs that are missing, and return when brokers say that they are there.

    Faust would create them while workers join: whoever assigns partitions by then and does not know a changelog yet
    leaves it out, without a word, at this rebalance and at others. Then a table is not read back: its fuses are lost.
    Raises `TopicMismatchError` for a wrong partition count, a `KafkaError`, and `TimeoutError`.
    """
    names = [f"{app_id}-{table}-changelog" for table in TABLES]
    admin = AIOKafkaAdminClient(**admin_options(broker, CLIENT_ID))
    await admin.start()
    try:
        existing = await _partition_counts(admin, names)
        missing = [
            NewTopic(
                name=name, num_partitions=partitions, replication_factor=replication, topic_configs=CHANGELOG_CONFIGS
            )
            for name in names
            if name not in existing
        ]
        if missing:
            await _create(admin, missing)
        async with asyncio.timeout(VISIBLE_S_MAX):
            while len(existing := await _partition_counts(admin, names)) < len(names):  # noqa: ASYNC110 - it is the broker's
                await asyncio.sleep(LOOK_AGAIN_S)
    finally:
        await admin.close()
    for name, count in existing.items():
        if count != partitions:
            raise TopicMismatchError(
                f"{name} has {count} partitions, and this deployment wants {partitions}. Set SPENDFUSE_PARTITIONS to "
                "what exists, or use another SPENDFUSE_APP_ID"
            )


async def _create(admin: AIOKafkaAdminClient, topics: list[NewTopic]) -> None:
    response = await admin.create_topics(topics)
    for name, code, *rest in response.topic_errors:
        if code not in {0, TOPIC_ALREADY_EXISTS}:
            raise for_code(code)(f"topic {name} was not created: {rest[0] if rest else code}")


async def _partition_counts(admin: AIOKafkaAdminClient, wanted: Iterable[str]) -> dict[str, int]:
    known = set(await admin.list_topics())
    names = [name for name in wanted if name in known]
    if not names:
        return {}
    described = await admin.describe_topics(names)
    return {topic["topic"]: len(topic["partitions"]) for topic in described if not topic["error_code"]}
