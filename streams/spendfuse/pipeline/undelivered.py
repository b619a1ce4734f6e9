"""What a broker did not take, in words: the worker ends with it, and says so where it still can."""

import asyncio
import contextlib
import hashlib
from typing import Final

import aiokafka.errors as kafka
from aiokafka.errors import KafkaError

from spendfuse.pipeline.lag import SCOPE
from spendfuse.pipeline.outbox import KafkaOutbox
from spendfuse.pipeline.publish import Publisher
from spendfuse.settings import BrokerSettings
from spendfuse.wire.base import from_us
from spendfuse.wire.control import Alert
from spendfuse.wire.topics import MESSAGE_BYTES_MAX

TELL_S: Final = 5.0
MESSAGE_CHARS_MAX: Final = 512
_TOO_LARGE: Final = f"set the topic's max.message.bytes to at least {MESSAGE_BYTES_MAX}"
_FORBIDDEN: Final = "let the worker's principal write to it"
_REPLICAS: Final = "bring its replicas back, or lower its min.insync.replicas"
ADVICE: Final[dict[type[KafkaError], str]] = {
    kafka.MessageSizeTooLargeError: _TOO_LARGE,
    kafka.RecordListTooLargeError: _TOO_LARGE,
    kafka.TopicAuthorizationFailedError: _FORBIDDEN,
    kafka.ClusterAuthorizationFailedError: _FORBIDDEN,
    kafka.NotEnoughReplicasError: _REPLICAS,
    kafka.NotEnoughReplicasAfterAppendError: _REPLICAS,
    kafka.KafkaStorageError: "make room on the broker's disk, and restart the broker",
}
ADVICE_ELSE: Final = "see the broker's log"


class Undelivered:
    """The first delivery that failed: all that follow, and the end of the worker, come from it."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.sentence = ""

    def note(self, topic: str, error: KafkaError) -> None:
        """Take in a failed delivery."""
        if not self.sentence:
            what = getattr(error, "message", "") or type(error).__name__
            advice = ADVICE.get(type(error), ADVICE_ELSE)
            self.sentence = (
                f"the broker does not take records for {topic} ({what}): {advice}, and start the worker again. "
                "Nothing is lost: it goes on where its sums were last stored"
            )

    async def tell(self, broker: BrokerSettings, now_us: int) -> None:
        """Publish an alert, if `alerts.v1` is not refused as well."""
        name = hashlib.blake2b(f"undelivered\n{now_us}\n{self.sentence}".encode(), digest_size=16).hexdigest()
        message = f"a worker has ended: {self.sentence}"[:MESSAGE_CHARS_MAX]
        alert = Alert(id=name, ts=from_us(now_us), kind="lag", severity="critical", scope=SCOPE, message=message)
        outbox = KafkaOutbox(broker, delivery_s=TELL_S)
        with contextlib.suppress(KafkaError, TimeoutError):
            async with asyncio.timeout(TELL_S):
                await outbox.start()
                try:
                    await (await Publisher(outbox, None, 1).alert(alert))
                finally:
                    await outbox.stop()
