"""`spendfuse incidents`: one halt's story, from the trail in ClickHouse."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from spendfuse.cli.options import STATE_DIR, Json, Servers, StateDir, command, duration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spendfuse.cli.target import Target

LIMIT_DEFAULT: Final = 20
AGENTS_MAX: Final = 1_000
SINCE_DEFAULT: Final = "30d"
ID_CHARS_SHOWN: Final = 8
LAST: Final = datetime(2105, 1, 1, tzinfo=UTC)
_ID: Final = re.compile(r"[0-9a-f]{1,32}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(
        app,
        incidents,
        "spendfuse incidents",
        "spendfuse incidents 3f9c21   (the beginning of an id is enough)",
        "spendfuse incidents --workspace acme --since 24h --json",
    )


def incidents(
    incident: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Tell the story of this one; its id, or the beginning of it.")
    ] = None,
    workspace: Annotated[str, typer.Option(metavar="NAME", help="Of this workspace alone.")] = "",
    since: Annotated[str, typer.Option(metavar="TIME", help="Halts ordered so long ago at most.")] = SINCE_DEFAULT,
    limit: Annotated[int, typer.Option(min=1, max=1_000, help="Most to list, the latest first.")] = LIMIT_DEFAULT,
    bootstrap_servers: Servers = None,
    state_dir: StateDir = STATE_DIR,
    as_json: Json = False,
) -> None:
    """Tell what became of each halt: the trip, the command, who stopped when, what was still spent, and how it ended.

    Read from ClickHouse: of SPENDFUSE_CLICKHOUSE_URL, else of the audit process on this machine.
    """
    from spendfuse.audit import queries
    from spendfuse.cli import console, target
    from spendfuse.cli.faults import CliError, usage_error
    from spendfuse.wire.base import from_us

    if incident is not None and _ID.fullmatch(incident) is None:
        raise usage_error(f"{incident[:64]!r} is no incident's id: it is up to 32 of 0-9 a-f, as `incidents` lists it")
    where = target.find(bootstrap_servers, state_dir)
    asked = {
        "workspace": workspace,
        "id": incident or "",
        "since": datetime.min.replace(year=1970, tzinfo=UTC) if incident else from_us(where.clock()) - duration(since),
        "until": LAST,
        "limit": limit,
    }
    client = queries.connect(_audit_of(where))
    try:
        rows = _ask(client, "incidents", asked)
        one = rows[0] if incident is not None and len(rows) == 1 else None
        agents = _ask(client, "incident_agents", _agents_asked(one)) if one is not None else []
    finally:
        client.close()
    if incident is not None and not rows:
        raise CliError(f"no halt whose id begins with {incident} was ever sent: see `spendfuse incidents --since 1w`")
    if as_json:
        console.data(
            [_plain(row) for row in rows] if one is None else _plain(one) | {"per_agent": [*map(_plain, agents)]}
        )
    elif one is not None:
        _tell(one, agents)
    else:
        _list(rows, since)


def _audit_of(where: "Target") -> Any:
    from spendfuse.settings import AuditSettings

    settings = AuditSettings.from_env(where.env)
    if where.up is not None and where.up.clickhouse_directory is not None and not settings.clickhouse_url:
        return settings.model_copy(update={"chdb_dir": str(Path(where.up.clickhouse_directory))})
    return settings


def _ask(client: Any, name: str, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    from spendfuse.audit import queries

    result = client.query(queries.load(name), parameters=parameters)
    return [
        {column: _aware(value) for column, value in zip(result.column_names, row, strict=True)}
        for row in result.result_rows
    ]


def _agents_asked(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": row["command_id"],
        "scope": row["scope"],
        "since": row["issued_at"],
        "until": row["ended_at"] or LAST,
        "limit": AGENTS_MAX,
    }


def _aware(value: Any) -> Any:
    return value.replace(tzinfo=UTC) if isinstance(value, datetime) and value.tzinfo is None else value


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    from spendfuse.wire.base import rfc3339

    return {name: rfc3339(value) if isinstance(value, datetime) else value for name, value in row.items()}


def _list(rows: "Sequence[dict[str, Any]]", since: str) -> None:
    from spendfuse.cli import console

    if not rows:
        console.note(f"nothing was halted in the last {since}")
        return
    console.table(
        ["id", "halted", "scope", "cap", "spent of cap", "stopped", "halt lag", "spent after", "ended"],
        [
            [
                row["command_id"][:ID_CHARS_SHOWN],
                f"{row['issued_at']:%Y-%m-%d %H:%M:%S}",
                row["scope"],
                f"{row['budget']}, {row['cap']}",
                _of_cap(row),
                (_stopped(row), "" if row["agents"] else "yellow"),
                _lag(row["last_lag_us"]),
                (_after(row), "bold red" if row["violations"] else ""),
                _end(row),
            ]
            for row in rows
        ],
        right=["halt lag"],
    )
    console.note("spendfuse incidents ID tells one of them; spent after holds calls that were in flight at the halt")


def _tell(row: dict[str, Any], agents: "Sequence[dict[str, Any]]") -> None:
    from spendfuse.cli import console

    console.line(f"{row['scope']}: {row['message'] or 'halted'}", "bold")
    console.table(["when (UTC)", "what", ""], [[f"{at:%m-%d %H:%M:%S.%f}", what, how] for at, what, how in _story(row)])
    if row["agents"] == 0:
        console.line("No guard ever answered: none was connected, or none of this scope obeys.", "yellow")
    if row["violations"]:
        console.line(f"{row['violations']} alerts say that its spending went on: see the agents below.", "bold red")
    if agents:
        console.line("")
        console.table(
            [
                "agent",
                "received",
                "stopped",
                "by",
                "halt lag",
                "in flight then",
                "tokens since",
                "spent after",
                "last call",
            ],
            [
                [
                    each["agent"],
                    _clock(each["received_at"]),
                    _clock(each["enforced_at"]),
                    _word(each),
                    _lag(each["lag_us"]),
                    _count(each["in_flight_at_stop"]),
                    _count(each["tokens_since"]),
                    _after(each),
                    _clock(each["last_spent_at"]),
                ]
                for each in agents
            ],
            right=["halt lag", "in flight then", "tokens since"],
        )
        console.note(
            "in flight then, tokens since: what the guards said when they stopped; spent after: what was charged"
        )


def _story(row: dict[str, Any]) -> list[tuple[datetime, str, str]]:
    """Return what happened, in order: when, what, and how."""
    reason = f": {row['reason']}" if row["reason"] else ""
    stopped = f"{row['agents_stopped']} agents ({row['agents_proved']} proved), {_lag(row['last_lag_us'])}"
    told: list[tuple[datetime | None, str, str]] = [
        (row["crossed_at"], "cap crossed", f"usage {row['cause_usage_id']}; {_of_cap(row)}"),
        (row["issued_at"], "halt ordered", f"by {row['issued_by']} ({row['budget']}, cap {row['cap']}){reason}"),
        (row["received_at"], "first guard received it", f"{row['guards']} guards of {row['agents']} agents in all"),
        (row["enforced_at"], "first agent stopped", f"halt lag {_lag(row['first_lag_us'])}"),
        (row["all_enforced_at"], "last agent stopped", stopped),
        (row["last_spent_at"], "last call that ended after it", f"{_after(row)}, by {row['agents_after']} agents"),
        (row["ended_at"], f"ended by {row['ended_by']}", _lifted(row)),
    ]
    return sorted(((at, what, how) for at, what, how in told if at is not None), key=lambda each: each[0])


def _lifted(row: dict[str, Any]) -> str:
    return f"by {row['lifted_by']}: {row['lift_reason']}".rstrip(": ") if row["lifted_by"] else ""


def _of_cap(row: dict[str, Any]) -> str:
    from spendfuse.engine.sentences import amount

    if not row["unit"]:
        return "no cap: a person's halt"
    return f"{amount(row['spend_at_halt'], row['unit'])} of {amount(row['cap_amount'], row['unit'])}"


def _after(row: dict[str, Any]) -> str:
    from spendfuse.engine.sentences import money

    if not row["calls_after"]:
        return "nothing"
    sums = ", ".join(money(nanos, currency) for currency, nanos in sorted(row["nanos_after"].items()))
    return f"{sums} in {row['calls_after']:,} calls"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _end(row: dict[str, Any]) -> str:
    if not row["ended_at"]:
        return "holds"
    by = f" by {row['lifted_by']}" if row["lifted_by"] else ""
    return f"{row['ended_by']}{by} {row['ended_at']:%m-%d %H:%M:%S}"


def _stopped(row: dict[str, Any]) -> str:
    """Return how many agents said that they stopped, and of how many that is proved."""
    if not row["agents_stopped"]:
        return f"0 of {row['agents']}"
    return f"{row['agents_stopped']} of {row['agents']} ({row['agents_proved']} proved)"


def _word(agent: dict[str, Any]) -> str:
    """Return whose word it is that an agent stopped: a key's, or anybody's."""
    if agent["enforced_at"] is None:
        return ""
    return f"proved by {agent['proved_by']}" if agent["proved_by"] else "claimed"


def _lag(us: int | None) -> str:
    return "" if us is None else f"{us / 1_000:,.1f} ms"


def _clock(at: datetime | None) -> str:
    return "" if at is None else f"{at:%H:%M:%S.%f}"
