"""A peer's bare windowed sum over a topic.

    bare_sums.py aiokafka|quixstreams|bytewax SERVERS TOPIC GROUP COUNT [mixed]

It runs in an environment of its own (locks/peers.txt), never in the project's. It reads JSON, and
adds the output tokens of each agent in an hour's tumbling window; no check of what it reads, no price, no cap, no
remembered ids. Where messages mix agents (`mixed`), quixstreams groups by agent: it sums for each message key, which
there is the key of no agent. It prints `ready` at the first usage, and `done TOKENS` once it has seen COUNT more.
"""

import json
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from functools import partial

ALIGN_TO = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
BATCH = 1_000


class Progress:
    """Counts usages; says when the first has been added, and when all have."""

    def __init__(self, count: int) -> None:
        """Take how many come after the first."""
        self.left = count + 1
        self.last = count
        self.tokens = 0
        self.stop = self._done

    def _done(self) -> None:
        print("done", self.tokens, flush=True)

    def add(self, tokens: int) -> None:
        """Take one usage's tokens."""
        self.left -= 1
        self.tokens += tokens
        if self.left == self.last:
            print("ready", flush=True)
        elif self.left == 0:
            self.stop()


def usages(message: dict) -> list[dict]:
    """Return the usages of a message, single or packed."""
    return message.get("usages") or [message]


def aiokafka(servers: str, topic: str, group: str, progress: Progress) -> None:
    """Read with aiokafka and add up in a dict: what a Python consumer costs at the least; nothing is kept."""
    import asyncio

    from aiokafka import AIOKafkaConsumer

    async def read() -> None:
        sums: dict = {}
        consumer = AIOKafkaConsumer(topic, bootstrap_servers=servers, group_id=group, auto_offset_reset="earliest")
        await consumer.start()
        while True:
            for records in (await consumer.getmany(timeout_ms=200)).values():
                for record in records:
                    for usage in usages(json.loads(record.value)):
                        window = usage["agent"], usage["ts"][:13]
                        sums[window] = sums.get(window, 0) + usage["tokens"]["output"]
                        progress.add(usage["tokens"]["output"])

    asyncio.run(read())


def quixstreams(servers: str, topic: str, group: str, progress: Progress, *, mixed: bool) -> None:
    """Run quixstreams as its documentation does: JSON, a tumbling window's sum, state with its changelog."""
    from quixstreams import Application

    with tempfile.TemporaryDirectory() as state:
        app = Application(
            broker_address=servers,
            consumer_group=group,
            auto_offset_reset="earliest",
            state_dir=state,
            loglevel="ERROR",
        )
        frame = app.dataframe(app.topic(topic, value_deserializer="json"))
        frame = frame.apply(usages, expand=True)
        frame = (frame.group_by("agent") if mixed else frame).apply(_output)
        frame = frame.tumbling_window(HOUR).sum().current()
        _Counting.progress = progress
        progress.stop = app.stop
        frame.update(_counted, metadata=False)
        app.run()  # it returns once the last state is written and its changelog acknowledged
    print("done", progress.tokens, flush=True)


class _Counting:
    progress: Progress
    before: dict = {}  # noqa: RUF012 - one process, one run


def _output(usage: dict) -> int:
    tokens = usage["tokens"]["output"]
    _Counting.progress.add(tokens)
    return tokens


def _counted(_window: dict) -> None:
    """Take each update of a window, as a consumer of it would."""


def bytewax(servers: str, topic: str, _group: str, progress: Progress) -> None:
    """Run bytewax as its documentation does: JSON, a tumbling window's fold, nothing recovered."""
    import bytewax.operators as op
    from bytewax.connectors.kafka import KafkaSource
    from bytewax.dataflow import Dataflow
    from bytewax.operators import windowing
    from bytewax.testing import run_main
    from confluent_kafka import OFFSET_BEGINNING

    def keyed(message: object) -> list[tuple[str, tuple[datetime, int]]]:
        return [
            (usage["agent"], (datetime.fromisoformat(usage["ts"]), usage["tokens"]["output"]))
            for usage in usages(json.loads(message.value))
        ]

    def add(total: int, item: tuple[datetime, int]) -> int:
        progress.add(item[1])
        return total + item[1]

    flow = Dataflow("bench")
    source = KafkaSource([servers], [topic], starting_offset=OFFSET_BEGINNING, batch_size=BATCH, tail=True)
    stream = op.flat_map("keyed", op.input("in", flow, source), keyed)
    clock = windowing.EventClock(lambda item: item[0], wait_for_system_duration=timedelta(seconds=10))
    windower = windowing.TumblingWindower(align_to=ALIGN_TO, length=HOUR)
    sums = windowing.fold_window("sum", stream, clock, windower, int, add, lambda a, b: a + b, ordered=False)
    op.inspect("out", sums.down, lambda *_: None)
    run_main(flow)


def main() -> None:
    """Run one peer until it is ended."""
    name, servers, topic, group, count, *mixed = sys.argv[1:]
    run = {"aiokafka": aiokafka, "quixstreams": partial(quixstreams, mixed=bool(mixed)), "bytewax": bytewax}[name]
    run(servers, topic, group, Progress(int(count)))


if __name__ == "__main__":
    main()
