"""Reading the trail: the queries of `sql/queries`, and a client to run them with."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

import clickhouse_connect
from clickhouse_connect.driver.exceptions import ClickHouseError

from spendfuse.audit.address import Address, AuditNotRunningError, read_address
from spendfuse.audit.database import CONNECT_TIMEOUT_S, SEND_RECEIVE_TIMEOUT_S, connect_server, database_name
from spendfuse.audit.files import query_text
from spendfuse.settings import AuditSettings

if TYPE_CHECKING:
    from clickhouse_connect.driver.client import Client

__all__ = ["connect", "connect_to", "load"]

load: Final = query_text
"""Return the text of a query by its name; raises SqlMissingError, naming those there are."""


def connect(settings: AuditSettings) -> "Client":
    """Return a read client: of the server in the settings, else of the audit process that owns the embedded engine.

    The audit's database is chosen, so that the queries name tables without it.
    Raises AuditNotRunningError or DatabaseUnavailableError.
    """
    if settings.clickhouse_url:
        return connect_server(settings, database_name(settings))
    return connect_to(read_address(Path(settings.chdb_dir)))


def connect_to(address: Address) -> "Client":
    """Return a read client of an endpoint; raises AuditNotRunningError when nobody answers there."""
    host, _, port = address.url.removeprefix("http://").partition(":")
    try:
        return clickhouse_connect.get_client(
            interface="http",
            host=host,
            port=int(port),
            username=address.user,
            password=address.token.get_secret_value(),
            database=address.database,
            compress=False,
            connect_timeout=CONNECT_TIMEOUT_S,
            send_receive_timeout=SEND_RECEIVE_TIMEOUT_S,
            autogenerate_session_id=False,
        )
    except ClickHouseError as error:
        raise AuditNotRunningError(
            f"the audit process at {address.url} does not answer as it should: {error}. Restart it"
        ) from error
