"""`spendfuse report`: what was spent, by whom, on what; from the trail in ClickHouse."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from spendfuse.cli import trail
from spendfuse.cli.audit import audit
from spendfuse.cli.options import STATE_DIR, Json, StateDir, command, examples

if TYPE_CHECKING:
    from collections.abc import Callable

    from spendfuse.audit.reports import Chargeback, Period, Report, RunRecord
    from spendfuse.cli.console import Cell
    from spendfuse.cli.target import Target

BAR_CELLS: Final = 20
CONTEXT_BARS: Final = 20
"""Most lines a run's context length is drawn in."""
CONTROL_SUFFIX: Final = ".control.json"

report = typer.Typer(
    help="What was spent, by whom and on what, from the trail in ClickHouse.",
    no_args_is_help=True,
    epilog=examples(
        "spendfuse report team --month 2026-11", "spendfuse report chargeback --month 2026-11 --out november.csv"
    ),
)

Month = Annotated[str | None, typer.Option(metavar="YYYY-MM", help="A month (UTC); this month when nothing is said.")]
From = Annotated[
    str | None, typer.Option("--from", metavar="DAY", help="First day (UTC), such as 2026-11-01; with --to.")
]
To = Annotated[
    str | None, typer.Option("--to", metavar="DAY", help="Last day (UTC), itself included; today by default.")
]
Workspace = Annotated[
    str, typer.Option("--workspace", envvar="SPENDFUSE_WORKSPACE", metavar="NAME", help="Only this one; else all.")
]
Csv = Annotated[bool, typer.Option("--csv", help="Print CSV (RFC 4180) with exact amounts and every counter.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(report, wallet, "spendfuse report wallet", "spendfuse report wallet --from 2026-11-20 --to 2026-11-23")
    command(report, team, "spendfuse report team --month 2026-11", "spendfuse report team --workspace acme --json")
    command(report, agent, "spendfuse report agent --team research", "spendfuse report agent --month 2026-11 --csv")
    command(report, run, "spendfuse report run weekly-report-0047", "spendfuse report run weekly-report-0047 --csv")
    command(report, workflow, "spendfuse report workflow --month 2026-11")
    command(report, models, "spendfuse report models --from 2026-11-01")
    # No report: it reads every row of the period, and finds what should not be there.
    command(audit, duplicates, "spendfuse audit duplicates", "spendfuse audit duplicates --month 2026-11 --json")
    command(
        report, chargeback,
        "spendfuse report chargeback --month 2026-11",
        "spendfuse report chargeback --month 2026-11 --out november.csv",
    )  # fmt: skip
    app.add_typer(report, name="report")


def wallet(
    month: Month = None, from_: From = None, to: To = None, workspace: Workspace = "",
    state_dir: StateDir = STATE_DIR, csv: Csv = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Show what left each wallet, day by day."""
    _show("wallet", month, from_, to, workspace, state_dir, csv=csv, as_json=as_json)


def team(
    month: Month = None, from_: From = None, to: To = None, workspace: Workspace = "",
    state_dir: StateDir = STATE_DIR, csv: Csv = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Show what each team spent."""
    _show("team", month, from_, to, workspace, state_dir, csv=csv, as_json=as_json)


def agent(
    team: Annotated[str, typer.Option(metavar="NAME", help="Only agents of this team.")] = "",
    month: Month = None, from_: From = None, to: To = None, workspace: Workspace = "",
    state_dir: StateDir = STATE_DIR, csv: Csv = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Show what each agent spent."""
    _show("agent", month, from_, to, workspace, state_dir, csv=csv, as_json=as_json, team=team)


def workflow(
    month: Month = None, from_: From = None, to: To = None, workspace: Workspace = "",
    state_dir: StateDir = STATE_DIR, csv: Csv = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Show what each workflow cost."""
    _show("workflow", month, from_, to, workspace, state_dir, csv=csv, as_json=as_json)


def models(
    month: Month = None, from_: From = None, to: To = None, workspace: Workspace = "",
    state_dir: StateDir = STATE_DIR, csv: Csv = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Show what was spent on each model, and what its caches served."""
    _show("models", month, from_, to, workspace, state_dir, csv=csv, as_json=as_json)


def duplicates(
    month: Month = None, from_: From = None, to: To = None, workspace: Workspace = "",
    state_dir: StateDir = STATE_DIR, csv: Csv = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Show calls that were charged again, because their id came after the worker had forgotten it; exit 1 for any.

    The worker remembers at least 261,120 call ids of each partition. `cost` is what was charged after the first time.
    """
    from spendfuse.audit.reports import read_duplicates, totals
    from spendfuse.cli import console

    _one_form(csv=csv, as_json=as_json)
    where = _target(state_dir)
    period, _ = _period(where, month, from_, to)
    with trail.asking(where) as client:
        found = read_duplicates(client, period, workspace, _progress())
    if csv:
        _write_csv(found.as_csv())
    elif as_json:
        console.data({
            "report": "duplicates", "from": f"{period.since}", "to": f"{period.last}",
            "cost_nanos": totals(found), "rows": found.as_data(),
        })  # fmt: skip
    elif found.rows:
        _print_report(found, period)
    else:
        console.line(f"no call of {period} was charged twice")
    raise typer.Exit(1 if found.rows else 0)


def _progress() -> "Callable[[int, int], None]":
    """Return what says on a terminal how many calls have been looked at; elsewhere nothing is said."""
    from spendfuse.cli import console

    err = console.err()

    def show(done: int, total: int) -> None:
        if err.is_terminal:
            err.print(f"{done:,} of {total:,} calls", end="\n" if done >= total else "\r", highlight=False)

    return show


def run(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Id of a run; of a root run: its whole tree.")],
    workspace: Workspace = "",
    state_dir: StateDir = STATE_DIR,
    csv: Csv = False,
    as_json: Json = False,
) -> None:
    """Show a run's record: tokens by kind, models, cache hits, money, its context call by call, and what stopped it.

    --csv prints its calls.
    """
    from spendfuse.audit.reports import read_run
    from spendfuse.cli import console

    _one_form(csv=csv, as_json=as_json)
    with trail.asking(_target(state_dir)) as client:
        record = read_run(client, run, workspace)
    if csv:
        _write_csv(record.turns.as_csv())
    elif as_json:
        console.data(record.as_data())
    else:
        _print_run(record)


def chargeback(
    month: Month = None,
    from_: From = None,
    to: To = None,
    workspace: Workspace = "",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the CSV there, and its control row beside it.")
    ] = None,
    state_dir: StateDir = STATE_DIR,
    csv: Csv = False,
    as_json: Json = False,
) -> None:
    """Charge a period's spend to teams and cost centres (tag cost_center): amounts that add up to the ledger.

    `amount` is rounded to the currency's minor unit by largest remainder, so that the file sums to the rounded total;
    `cost` is exact. The control row (rows, totals, SHA-256) goes to FILE.control.json, or to standard error.
    """
    from spendfuse.audit.reports import read_chargeback
    from spendfuse.cli import console

    _one_form(csv=csv, as_json=as_json)
    where = _target(state_dir)
    period, now = _period(where, month, from_, to)
    with trail.asking(where) as client:
        charged = read_chargeback(client, period, workspace)
    control = charged.control(now)
    if out is not None:
        _write_files(out, charged, control)
    if csv:
        _write_csv(charged.csv)
    elif as_json:
        console.data({**control, "charges": charged.report.as_data()})
    elif out is None:
        _print_report(charged.report, period)
    for each in control["totals"]:
        console.note(
            f"{each['currency']} {each['amount']} in {control['rows']} rows, SHA-256 of the CSV {control['sha256']}"
        )
    if not control["period_is_over"]:
        console.note(f"{period} is not over: these are the figures of this moment", "yellow")


def _show(
    name: str, month: str | None, first: str | None, last: str | None, workspace: str, state_dir: Path,
    *, csv: bool, as_json: bool, **parameters: str,
) -> None:  # fmt: skip
    from spendfuse.audit.reports import read
    from spendfuse.cli import console

    _one_form(csv=csv, as_json=as_json)
    where = _target(state_dir)
    period, _ = _period(where, month, first, last)
    with trail.asking(where) as client:
        found = read(client, name, period, workspace, **parameters)
    if csv:
        _write_csv(found.as_csv())
    elif as_json:
        console.data({"report": name, "from": f"{period.since}", "to": f"{period.last}", "rows": found.as_data()})
    else:
        _print_report(found, period)


def _one_form(*, csv: bool, as_json: bool) -> None:
    from spendfuse.cli.faults import usage_error

    if csv and as_json:
        raise usage_error("--csv and --json: choose one")


def _target(state_dir: Path) -> "Target":
    from spendfuse.cli import target

    return target.find(None, state_dir)


def _period(where: "Target", month: str | None, first: str | None, last: str | None) -> "tuple[Period, Any]":
    """Return the period and the deployment's time; raises a usage error."""
    from spendfuse.audit.reports import Period, ReportError
    from spendfuse.cli.faults import usage_error
    from spendfuse.wire.base import from_us

    now = from_us(where.clock())
    if month is not None and (first or last):
        raise usage_error("--month and --from/--to: choose one")
    if last is not None and first is None:
        raise usage_error("--to needs --from: the first day")
    try:
        if first is not None:
            return Period.days(first, last or f"{now:%Y-%m-%d}"), now
        return Period.month(month or f"{now:%Y-%m}"), now
    except ReportError as error:
        raise usage_error(str(error)) from error


def _write_csv(data: bytes) -> None:
    import sys

    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _write_files(out: Path, charged: "Chargeback", control: dict[str, Any]) -> None:
    """Write both files, each as a whole."""
    import json

    from spendfuse.cli import console

    beside = out.with_name(out.name + CONTROL_SUFFIX)
    for path, data in ((out, charged.csv), (beside, (json.dumps(control, indent=1) + "\n").encode())):
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(data)
        partial.replace(path)
        console.note(f"wrote {path}")


def _print_report(found: "Report", period: "Period") -> None:
    """Print rows with a bar of their part of the largest, and a total for each currency."""
    from spendfuse.audit.reports import totals
    from spendfuse.cli import console
    from spendfuse.engine.sentences import money

    if not found.rows:
        console.note(f"nothing was charged from {period}: is it the right period and workspace?")
        return
    shown = [column for column in found.columns if column.heading]
    largest: dict[str, int] = {}
    for row in found.rows:
        largest[row["currency"]] = max(largest.get(row["currency"], 0), int(row["cost_nanos"]))
    sums = totals(found)
    rows: list[list[Cell]] = [
        [
            *(_cell(row, column) for column in shown),
            *_bar(int(row["cost_nanos"]), largest[row["currency"]], sums[row["currency"]]),
        ]
        for row in found.rows
    ]
    headings = [column.heading for column in shown]
    console.table(
        [*headings, "share", *_bar_heading()],
        rows,
        right=[*(column.heading for column in shown if column.kind in ("count", "nanos", "share")), "share"],
    )
    for currency, nanos in sums.items():
        console.line(f"{money(nanos, currency)}  {period} (UTC), {len(found.rows):,} rows", "bold")


def _print_run(record: "RunRecord") -> None:
    from spendfuse.audit.reports import totals
    from spendfuse.cli import console
    from spendfuse.engine.sentences import money

    cost = " and ".join(money(nanos, currency) for currency, nanos in totals(record.models).items())
    hit = f"{record.cache_hit_bp // 100}.{record.cache_hit_bp % 100:02d} %"
    console.line(f"run:{record.workspace}/{record.run}", "bold")
    console.line(f"{cost}, {record.calls:,} calls, cache hit {hit}, longest context {record.context_max:,} tokens")
    console.line(f"agents: {', '.join(record.agents[:10])}{' ...' if len(record.agents) > 10 else ''}")  # noqa: PLR2004
    for part in (record.models, record.commands):
        if not part.rows:
            continue
        shown = [column for column in part.columns if column.heading]
        console.line("")
        console.table(
            [column.heading for column in shown],
            [[_cell(row, column) for column in shown] for row in part.rows],
            right=[column.heading for column in shown if column.kind in ("count", "nanos", "share")],
        )
    if not record.commands.rows:
        console.note("nothing was warned or halted")
    console.line("")
    console.table(["calls", "context", *_bar_heading()], _context_rows(record), right=["calls", "context"])


def _context_rows(record: "RunRecord") -> "list[list[Cell]]":
    """Return the longest context of each stretch of calls, at most CONTEXT_BARS of them."""
    lengths = [int(row["context_tokens"]) for row in record.turns.rows]
    per_line = max(1, -(-len(lengths) // CONTEXT_BARS))
    rows: list[list[Cell]] = []
    for start in range(0, len(lengths), per_line):
        stretch = lengths[start : start + per_line]
        label = f"{start + 1}" if len(stretch) == 1 else f"{start + 1}-{start + len(stretch)}"
        rows.append([label, f"{max(stretch):,}", *_bar(max(stretch), max(lengths))])
    return rows


def _bar_heading() -> list[str]:
    from spendfuse.cli import console

    return [""] if console.out().is_terminal else []


def _bar(value: int, largest: int, total: int | None = None) -> "list[Cell]":
    """Return the part of a total, when there is one, and on a terminal a bar that is full at the largest value."""
    from spendfuse.cli import console

    cells: list[Cell] = []
    if total is not None:
        tenths = 1_000 * value // total if total else 0
        cells.append(f"{tenths // 10}.{tenths % 10} %")
    out = console.out()
    if out.is_terminal:
        full = value * BAR_CELLS // largest if largest else 0
        cells.append(((("#" if out.options.ascii_only else "━") * full) or " ", "cyan"))
    return cells


def _cell(row: dict[str, Any], column: Any) -> "Cell":
    from spendfuse.engine.sentences import money

    value = row[column.name]
    match column.kind:
        case "nanos":
            return money(int(value), row["currency"])
        case "count":
            return f"{int(value):,}"
        case "share":
            return f"{int(value) // 100}.{int(value) % 100 // 10} %"
        case "instant":
            return "" if value is None else f"{value:%Y-%m-%d %H:%M:%S}"
        case _:
            return str(value) or "-"
