"""The tables' changelogs are there before a worker joins: whoever assigns partitions must know them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from spendfuse.client.connection import admin_options
from spendfuse.pipeline.topics import TopicMismatchError, ensure_changelogs
from workers import quick_settings

if TYPE_CHECKING:
    from spendfuse.embedded.tansu import EmbeddedBroker

NAMES = ("scopes", "ids", "shared")


@pytest.mark.broker
async def test_all_changelogs_exist_with_their_partitions_when_it_returns_and_again_changes_nothing(
    tansu: EmbeddedBroker,
) -> None:
    settings, app = quick_settings(tansu), "test-changelogs-made"
    for _ in range(2):
        await ensure_changelogs(settings, app, partitions=3, replication=1)
        admin = AIOKafkaAdminClient(**admin_options(settings, "test"))
        await admin.start()
        found = await admin.describe_topics([f"{app}-{name}-changelog" for name in NAMES])
        await admin.close()
        assert [len(topic["partitions"]) for topic in found] == [3, 3, 3]


@pytest.mark.broker
async def test_a_changelog_with_another_number_of_partitions_is_refused_with_both_numbers(
    tansu: EmbeddedBroker,
) -> None:
    settings, app = quick_settings(tansu), "test-changelogs-other"
    admin = AIOKafkaAdminClient(**admin_options(settings, "test"))
    await admin.start()
    await admin.create_topics([NewTopic(f"{app}-shared-changelog", 2, 1)])
    await admin.close()
    with pytest.raises(TopicMismatchError, match=r"shared-changelog has 2 partitions, and this deployment wants 3"):
        await ensure_changelogs(settings, app, partitions=3, replication=1)
