"""`spendfuse topics`: the table of topics, created."""

from typing import Annotated

import typer

from spendfuse.cli.options import STATE_DIR, Json, Servers, StateDir, command, examples

topics = typer.Typer(help="The Kafka topics.", no_args_is_help=True, epilog=examples("spendfuse topics create"))


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(
        topics,
        create,
        "spendfuse topics create",
        "spendfuse topics create -b kafka-1:9092 --partitions 12 --replication 3",
        "spendfuse topics create --json",
    )
    app.add_typer(topics, name="topics")


def create(
    partitions: Annotated[
        int | None,
        typer.Option(min=1, max=1_000, help="Partitions of usage, packed, rollup and ledger; fixed at birth."),
    ] = None,
    replication: Annotated[int | None, typer.Option(min=1, max=5, help="Replicas of each topic.")] = None,
    bootstrap_servers: Servers = None,
    state_dir: StateDir = STATE_DIR,
    as_json: Json = False,
) -> None:
    """Create the topics that are missing, and check those that exist.

    Partition counts are SPENDFUSE_PARTITIONS and SPENDFUSE_REPLICATION unless given.
    """
    from spendfuse.cli import console, kafka, target
    from spendfuse.pipeline.topics import TopicReport, ensure_topics
    from spendfuse.settings import WorkerSettings

    where = target.find(bootstrap_servers, state_dir)
    settings = WorkerSettings.from_env(where.env, partitions=partitions, replication=replication)

    async def make() -> list[TopicReport]:
        await kafka.partition_counts(where)  # says so in a sentence when nobody answers
        async with kafka.reaching(where):
            return await ensure_topics(where.broker, partitions=settings.partitions, replication=settings.replication)

    reports = kafka.run(make())
    if as_json:
        console.data(
            [
                {
                    "topic": report.topic.name,
                    "state": "created" if report.created else "exists",
                    "partitions": report.partitions,
                    "cleanup": report.topic.cleanup,
                    "retention_ms": report.topic.retention_ms,
                    "key": report.topic.key,
                    "what": report.topic.what,
                }
                for report in reports
            ]
        )
        return
    console.table(
        ["topic", "state", "partitions", "cleanup", "what"],
        [
            [
                report.topic.name,
                ("created", "green") if report.created else ("exists", "dim"),
                str(report.partitions),
                report.topic.cleanup,
                report.topic.what,
            ]
            for report in reports
        ],
        right=["partitions"],
    )
