"""Three defects of faust-streaming 0.15.3, cured from outside, and the proof that this is the version they are for.

1. Recovery loses source events: `Recovery.on_recovery_completed` resumes the source partitions, then awaits a seek,
   then clears the agents' queues; what was queued in between vanishes and is committed. The cure stops the flow
   before it starts; Faust resumes it itself, after its seek.
2. `fetch_max_wait_ms` is written out as 1500 in the worker's consumer: on a broker that does not wake a waiting
   fetch, every event waits up to that long.
3. The timer commits while the group rebalances. The broker refuses the old generation, aiokafka forgets the new one and
   joins again: a second rebalance right after the first, and the partitions stand still for a heartbeat's interval
   more. The cure lets the timer wait until the rebalance is over; what was acknowledged is committed then.

Faust's consumer is aiokafka's, so it is also given what ours have: no record batch can stop it.

And one of aiokafka 0.14: a subscription that changes while the group's coordinator is looked up, as Faust changes it
when a worker starts, fails an assertion in the task that keeps the group, and so ends the worker. The cure lets that
task begin its loop again, where it looks at the subscription anew.
"""

import hashlib
import inspect
import logging
from typing import Any, Final

import aiokafka
from aiokafka.consumer.group_coordinator import GroupCoordinator
from faust.tables.recovery import Recovery
from faust.transport.consumer import Consumer

from spendfuse.client.connection import read_anything

RECOVERY_SHA256: Final = "6ef567acf072e46da3fccbccc6d662371f634f622c3d510972d5df81f70ae3ac"
"""Of the source of `Recovery.on_recovery_completed` that the first cure was proved on."""
FAUST_FETCH_MAX_WAIT_MS: Final = 1_500
CHANGES_MAX: Final = 10
"""How often one consumer's group may meet a changed subscription; Faust subscribes a few times in a worker's life."""

_log = logging.getLogger(__name__)
_COORDINATION: Final = "_GroupCoordinator__coordination_routine"
_original_coordination = getattr(GroupCoordinator, _COORDINATION)
_original_recovery_completed = Recovery.on_recovery_completed
_original_consumer_init = aiokafka.AIOKafkaConsumer.__init__
_original_commit = Consumer.commit


class CureMismatchError(Exception):
    """Faust's source differs from the one the cures were proved on."""


def recovery_sha256() -> str:
    """Return the hash of the function that the first cure wraps."""
    return hashlib.sha256(inspect.getsource(_original_recovery_completed).encode()).hexdigest()


async def _recovery_completed(self: Any, generation_id: int = 0) -> None:
    self.app.consumer.stop_flow()
    await _original_recovery_completed(self, generation_id)


async def _coordination(self: Any) -> None:
    for changes in range(CHANGES_MAX + 1):
        try:
            await _original_coordination(self)
        except AssertionError:
            # Nothing was done on it: the assertions stand between a look at the subscription and the first action.
            if changes == CHANGES_MAX:
                raise
            _log.warning("the subscription of group %s changed in a rebalance; joining again", self.group_id)
        else:
            return


async def _commit(self: Any, topics: Any = None, start_new_transaction: bool = True) -> bool:
    if self.app.rebalancing and start_new_transaction:  # False: Faust's own last commit, before it gives up partitions
        return False
    return await _original_commit(self, topics, start_new_transaction)


def install(fetch_max_wait_ms: int) -> None:
    """Install the cures; calling it again only changes the fetch wait.

    Raises `CureMismatchError` when Faust is not the version they were proved on.
    """
    if recovery_sha256() != RECOVERY_SHA256:
        raise CureMismatchError(
            "Recovery.on_recovery_completed differs from faust-streaming 0.15.3: install that version, "
            "or prove the cure anew (tests/faults) and write down the new hash"
        )

    def consumer_init(self: Any, *topics: str, **options: Any) -> None:
        if options.get("fetch_max_wait_ms") == FAUST_FETCH_MAX_WAIT_MS:
            options["fetch_max_wait_ms"] = fetch_max_wait_ms
        _original_consumer_init(self, *topics, **options)
        read_anything(self)

    Recovery.on_recovery_completed = _recovery_completed  # type: ignore[method-assign]  # the cure itself
    Consumer.commit = _commit  # type: ignore[method-assign]  # the same
    aiokafka.AIOKafkaConsumer.__init__ = consumer_init
    setattr(GroupCoordinator, _COORDINATION, _coordination)


def uninstall() -> None:
    """Take the cures out, as a test that must fail without them does."""
    Recovery.on_recovery_completed = _original_recovery_completed  # type: ignore[method-assign]  # the same
    Consumer.commit = _original_commit  # type: ignore[method-assign]  # the same
    aiokafka.AIOKafkaConsumer.__init__ = _original_consumer_init
    setattr(GroupCoordinator, _COORDINATION, _original_coordination)
