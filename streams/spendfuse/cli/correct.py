"""`spendfuse usage correct`: what a charged usage should have been, as a signed correction."""

import sys
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple

import typer

from spendfuse.cli.options import STATE_DIR, Json, Servers, StateDir

if TYPE_CHECKING:
    from spendfuse.cli.kafka import Placed
    from spendfuse.cli.target import Target
    from spendfuse.wire.correction import Correction

COUNTERS: Final = ("input", "cache_read", "cache_write_5m", "cache_write_1h", "output", "reasoning")
RATED: Final = COUNTERS[:5]
NANO_DIGITS: Final = 9

_Final = Annotated[int | None, typer.Option(min=0, help="The final number; as charged when absent.")]


class Charged(NamedTuple):
    """A usage as the trail has it: its names, its counters and cost with what corrections have added, and its rates."""

    names: dict[str, Any]
    counters: dict[str, int]
    cost_nanos: int
    currency: str
    rates: tuple[int, ...]
    ts_us: int
    fixes: int


def correct(
    usage_id: Annotated[str, typer.Argument(metavar="USAGE_ID", help="The id of the usage, as its emitter gave it.")],
    reason: Annotated[str, typer.Option(metavar="WHY", help="provider_final, invoice or manual.")],
    by: Annotated[str, typer.Option(metavar="NAME", help="Who states it; the audit keeps it. No e-mail address.")],
    input_: Annotated[
        int | None, typer.Option("--input", min=0, help="Final prompt tokens that no cache served.")
    ] = None,
    output: Annotated[int | None, typer.Option(min=0, help="Final generated tokens, reasoning included.")] = None,
    cache_read: _Final = None,
    cache_write_5m: _Final = None,
    cache_write_1h: _Final = None,
    reasoning: _Final = None,
    cost: Annotated[
        str | None, typer.Option(metavar="AMOUNT", help="Final cost, such as 0.0125; else by the charge's own rates.")
    ] = None,
    note: Annotated[str, typer.Option(metavar="TEXT", help="Why, in one line, such as the invoice's number.")] = "",
    agent: Annotated[
        str, typer.Option(metavar="WORKSPACE/TEAM/AGENT", help="Whose usage, when several agents have the id.")
    ] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    bootstrap_servers: Servers = None,
    state_dir: StateDir = STATE_DIR,
    as_json: Json = False,
) -> None:
    """State the final numbers of a usage that was charged; the difference becomes an entry of the ledger.

    The charge is looked up in the trail and stays as it is. What earlier corrections added is taken into account, and
    stating the same numbers again is applied once. A scope that falls below its cap may go on, one that reaches it is
    halted. Signed with SPENDFUSE_SIGNING_KEY(_FILE), or the key of `spendfuse up`.
    """
    from spendfuse.cli import console, kafka, target
    from spendfuse.cli.faults import usage_error

    if as_json and not yes:
        raise usage_error("--json asks nothing: say --yes with it")
    where = target.find(bootstrap_servers, state_dir)
    said = (input_, cache_read, cache_write_5m, cache_write_1h, output, reasoning)
    finals = {name: value for name, value in zip(COUNTERS, said, strict=True) if value is not None}
    if not finals and cost is None:
        raise usage_error("say what the usage should have been: --output 1200, --cost 0.0125, ...")
    signer = where.signer()
    charged = look_up(where, usage_id, agent)
    correction = draft(charged, usage_id, finals, cost, reason=reason, by=by, note=note, now_us=where.clock())
    if not as_json:
        _show(charged, correction)
        if not yes and not _agreed():
            console.note("nothing was sent")
            raise typer.Exit(1)
    placed = kafka.run(_send(where, correction, signer))
    if as_json:
        console.data(
            {
                "correction": correction.model_dump(mode="json", exclude_none=True),
                "partition": placed.partition,
                "offset": placed.offset,
            }
        )
        return
    console.note(f"written to {where.servers} ({placed.partition}@{placed.offset}), correction {correction.id}")


def look_up(where: "Target", usage_id: str, agent: str) -> Charged:
    """Return a charged usage of the trail; raises CliError when there is none, or more than one."""
    from spendfuse.audit.queries import load
    from spendfuse.cli.faults import CliError, usage_error
    from spendfuse.cli.trail import asking

    with asking(where) as client:
        found = client.query(load("usage_charged"), parameters={"usage_id": usage_id})
    rows = [dict(zip(found.column_names, row, strict=True)) for row in found.result_rows]
    paths = [f"{row['workspace']}/{row['team']}/{row['agent']}" for row in rows]
    rows = [row for row, path in zip(rows, paths, strict=True) if agent in ("", path)]
    if not rows:
        whose = f" of {agent}" if agent else ""
        raise CliError(
            f"the trail has no charge {usage_id[:100]!r}{whose}: the audit may be behind (`spendfuse status`), or the "
            "usage was refused (`spendfuse dlq list`)"
        )
    if len(set(paths)) > 1 and not agent:
        raise usage_error(
            f"{len(set(paths))} agents have a usage {usage_id[:100]!r}: add --agent {paths[0]}, or another"
        )
    if len(rows) > 1:
        raise CliError(
            f"{usage_id[:100]!r} of {agent or paths[0]} was charged {len(rows)} times (see `spendfuse audit "
            "duplicates`): which one is meant cannot be said by its id"
        )
    return _charged(rows[0])


def _charged(row: dict[str, Any]) -> Charged:
    names = {
        name: row[name] for name in ("workspace", "team", "agent", "run", "root_run", "provider", "model", "tier")
    } | {"parent_run": row["parent_run"] or None, "workflow": row["workflow"] or None, "tags": dict(row["tags"])}
    counters = {name: int(row[name]) + int(row[f"fixed_{name}"]) for name in COUNTERS}
    cost = int(row["cost_nanos"]) + int(row["fixed_cost_nanos"])
    rates = tuple(int(rate) for rate in row["rates"])
    return Charged(names, counters, cost, row["currency"], rates, int(row["ts_us"]), int(row["fixes"]))


def draft(
    charged: Charged,
    usage_id: str,
    finals: dict[str, int],
    cost: str | None,
    *,
    reason: str,
    by: str,
    note: str,
    now_us: int,
) -> "Correction":
    """Return the correction that makes a usage what it should have been; raises a usage error."""
    import hashlib

    from pydantic import ValidationError

    from spendfuse.cli.faults import usage_error
    from spendfuse.engine.prices import round_half_even
    from spendfuse.wire.base import from_us
    from spendfuse.wire.correction import Correction, TokenDifferences

    after = charged.counters | finals
    if after["reasoning"] > after["output"]:
        raise usage_error(f"reasoning ({after['reasoning']:,}) is part of output ({after['output']:,}): give both")
    if cost is not None:
        cost_nanos = _nanos(cost)
    else:
        cost_nanos = round_half_even(sum(after[name] * rate for name, rate in zip(RATED, charged.rates, strict=True)))
    differences = {name: after[name] - charged.counters[name] for name in COUNTERS}
    path = "/".join(charged.names[name] for name in ("workspace", "team", "agent"))
    # The same numbers stated again before the trail has the first are the same correction.
    numbers = (charged.fixes, *(charged.counters[name] for name in COUNTERS), *(after[name] for name in COUNTERS))
    what = "\n".join([path, usage_id, *map(str, numbers), str(cost_nanos)])
    if not any(differences.values()) and cost_nanos == charged.cost_nanos:
        raise usage_error(f"{usage_id} is already what you say: there is nothing to correct")
    try:
        return Correction.model_validate(
            charged.names
            | {
                "type": "correction",
                "id": f"fix-{hashlib.sha256(what.encode()).hexdigest()[:32]}",
                "usage_id": usage_id,
                "ts": from_us(charged.ts_us),
                "at": from_us(now_us),
                "tokens": TokenDifferences(**differences),
                "cost_nanos": cost_nanos - charged.cost_nanos,
                "currency": charged.currency,
                "reason": reason,
                "note": note,
                "by": by,
            }
        )
    except ValidationError as error:
        faults = error.errors(include_input=False, include_url=False)
        raise usage_error(
            "; ".join(f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in faults)
        ) from error


def _nanos(text: str) -> int:
    from spendfuse.cli.faults import usage_error

    try:
        amount = Decimal(text)
    except InvalidOperation as error:
        raise usage_error(f"--cost {text[:40]!r} is no amount: write such as 0.0125") from error
    scaled = amount.scaleb(NANO_DIGITS) if amount.is_finite() else Decimal(-1)
    if scaled < 0 or scaled != scaled.to_integral_value():
        raise usage_error(f"--cost {text[:40]!r}: an amount is not below zero and has at most {NANO_DIGITS} decimals")
    return int(scaled)


def _show(charged: Charged, correction: "Correction") -> None:
    from spendfuse.cli import console

    console.line(f"{correction.usage_id}  {correction.agent_path}  {correction.provider}/{correction.model}")
    rows = [
        [name, f"{now:,}", f"{now + more:,}", f"{more:+,}"]
        for name, now in charged.counters.items()
        for more in (getattr(correction.tokens, name),)
    ]
    now, more = charged.cost_nanos, correction.cost_nanos
    amounts = [Decimal(nanos).scaleb(-NANO_DIGITS) for nanos in (now, now + more, more)]
    rows.append([f"cost {charged.currency}", f"{amounts[0]:,.9f}", f"{amounts[1]:,.9f}", f"{amounts[2]:+,.9f}"])
    columns = ["counter", "counted now" if charged.fixes else "charged", "will be", "difference"]
    console.table(columns, rows, right=columns[1:])


def _agreed() -> bool:
    from spendfuse.cli.faults import usage_error

    if not sys.stdin.isatty():
        raise usage_error("nobody is there to be asked: say --yes")
    return typer.confirm("State this correction?", err=True)


async def _send(where: "Target", correction: "Correction", signer: Any) -> "Placed":
    from spendfuse.cli import kafka
    from spendfuse.wire.base import encode
    from spendfuse.wire.cloudevents import headers
    from spendfuse.wire.signing import SIGNATURE_HEADER
    from spendfuse.wire.topics import USAGE

    await kafka.check_topics(where, USAGE.name)
    key, value = correction.agent_path.encode(), encode(correction)
    labels = headers("correction.v1", "//spendfuse/cli", correction.id, correction.at)
    if signer is not None:
        labels.append((SIGNATURE_HEADER, signer.sign(USAGE.name, key, value)))
    async with kafka.sending(where) as send:
        return await send(USAGE.name, value, key, labels)
