"""A deployment's trail as the command line reads it."""

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clickhouse_connect.driver.client import Client

    from spendfuse.cli.target import Target


@contextmanager
def asking(where: "Target") -> "Iterator[Client]":
    """Give a read client of the deployment's trail; what goes wrong becomes a sentence."""
    from clickhouse_connect.driver.exceptions import ClickHouseError

    from spendfuse.audit.queries import connect
    from spendfuse.cli.faults import EXIT_UNAVAILABLE, CliError
    from spendfuse.settings import AuditSettings

    settings = AuditSettings.from_env(where.env)
    if where.up is not None and not settings.clickhouse_url:
        if where.up.clickhouse_directory is None:
            raise CliError("this `spendfuse up` runs without an audit: start it with one", EXIT_UNAVAILABLE)
        settings = settings.model_copy(update={"chdb_dir": where.up.clickhouse_directory})
    client = connect(settings)
    try:
        yield client
    except ClickHouseError as error:
        raise CliError(
            f"ClickHouse does not answer the question: {str(error)[:300]}. See `spendfuse doctor`", EXIT_UNAVAILABLE
        ) from error
    finally:
        client.close()
