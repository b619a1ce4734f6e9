"""`spendfuse halt` and `spendfuse resume`: a person's commands, signed."""

import contextlib
import re
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from spendfuse.cli.options import STATE_DIR, Json, Servers, StateDir, command, duration

if TYPE_CHECKING:
    from spendfuse.cli.kafka import Placed
    from spendfuse.cli.target import Target
    from spendfuse.client.follow import Record
    from spendfuse.wire.control import Ack, Command

WAIT_S_DEFAULT: Final = 2.0
ACKS_MAX: Final = 10_000
POLL_MS: Final = 50
US_PER_MS: Final = 1_000
SEQ_PER_MS: Final = 1_000
SCOPE_FORMS: Final = "agent:WORKSPACE/TEAM/AGENT, team:WORKSPACE/TEAM, workspace:WORKSPACE or run:WORKSPACE/RUN"

ScopeArgument = Annotated[
    str, typer.Argument(metavar="SCOPE", help="agent:acme/research/planner-7, team:..., workspace:... or run:...")
]
Reason = Annotated[str, typer.Option(metavar="TEXT", help="Why; agents and the audit show it.")]
By = Annotated[str, typer.Option(metavar="NAME", help="Who decides; the audit keeps it. No e-mail address.")]
Wait = Annotated[float, typer.Option(min=0.0, max=60.0, help="Seconds to wait for guards to acknowledge.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(
        app,
        halt,
        "spendfuse halt agent:acme/research/planner-7 --reason 'loops on one page' --by ada",
        "spendfuse halt workspace:acme --reason 'invoice looks wrong' --by ada --for 2h",
    )
    command(
        app,
        resume,
        "spendfuse resume agent:acme/research/planner-7 --reason 'prompt fixed' --by ada",
        "spendfuse resume agent:acme/research/planner-7 --budget research --cap day-usd --reason ok --by ada",
    )


def halt(
    scope: ScopeArgument,
    reason: Reason,
    by: By,
    for_: Annotated[
        str | None, typer.Option("--for", metavar="TIME", help="Until then, such as 2h; else until resumed.")
    ] = None,
    wait: Wait = WAIT_S_DEFAULT,
    bootstrap_servers: Servers = None,
    state_dir: StateDir = STATE_DIR,
    as_json: Json = False,
) -> None:
    """Stop a scope and everything below it, now.

    No cap's end lifts a person's halt: it holds until `spendfuse resume`, or the end of --for. A guard that is away
    obeys as soon as it reads the topic again. Signed with SPENDFUSE_SIGNING_KEY(_FILE), or the key of `spendfuse up`.
    """
    lasts = duration(for_) if for_ is not None else None
    _command("halt", scope, reason, by, None, None, lasts, wait, bootstrap_servers, state_dir, as_json=as_json)


def resume(
    scope: ScopeArgument,
    reason: Reason,
    by: By,
    budget: Annotated[
        str | None, typer.Option(help="Lift a cap's trip instead of a person's halt; with --cap.")
    ] = None,
    cap: Annotated[str | None, typer.Option(help="The cap; with --budget.")] = None,
    wait: Wait = WAIT_S_DEFAULT,
    bootstrap_servers: Servers = None,
    state_dir: StateDir = STATE_DIR,
    as_json: Json = False,
) -> None:
    """Let a halted scope go on: lift a person's halt, or with --budget and --cap the trip of one cap.

    It lifts that halt only: whatever else halts the scope still does.
    """
    from spendfuse.cli.faults import usage_error

    if (budget is None) != (cap is None):
        raise usage_error("--budget and --cap go together: a trip is of one cap of one budget")
    _command("resume", scope, reason, by, budget, cap, None, wait, bootstrap_servers, state_dir, as_json=as_json)


def _command(
    action: str, scope: str, reason: str, by: str, budget: str | None, cap: str | None, lasts: Any,
    wait_s: float, servers: str | None, state_dir: Any, *, as_json: bool,
) -> None:  # fmt: skip
    from spendfuse.cli import console, kafka, target

    where = target.find(servers, state_dir)
    signer = where.signer()
    draft = draft_command(action, scope, reason, by, budget, cap, lasts, now_us=where.clock())
    command, placed, acks = kafka.run(_publish(where, draft, signer, wait_s))
    if as_json:
        console.data(
            {
                "command": command.model_dump(mode="json", exclude_none=True),
                "offset": placed.offset,
                "acks": [ack.model_dump(mode="json", exclude_none=True) for ack in acks],
            }
        )
        return
    console.line(command.message, "bold red" if action == "halt" else "bold green")
    console.note(f"written to {where.servers} (offset {placed.offset}), command {command.id}")
    if acks:
        console.table(
            ["agent", "run", "guard", "state", "at"],
            [[ack.agent, ack.run or "", ack.guard, ack.state, f"{ack.at:%H:%M:%S.%f}"] for ack in acks],
        )
    elif action == "halt" and wait_s:
        console.note(f"no guard has acknowledged it within {wait_s:g} s: none of this scope is connected now", "yellow")


def draft_command(
    action: Any, scope: str, reason: str, by: str, budget: str | None, cap: str | None, lasts: Any, *, now_us: int
) -> "Command":
    """Return a person's command with the sequence of this instant; raises a usage error for what is not valid."""
    import uuid

    from pydantic import ValidationError

    from spendfuse.cli.faults import usage_error
    from spendfuse.wire.base import NAME_PATTERN, SCOPE_PATTERN, from_us
    from spendfuse.wire.control import MANUAL_BUDGET, MANUAL_CAP, Command

    if re.fullmatch(SCOPE_PATTERN, scope) is None:
        raise usage_error(f"{scope[:100]!r} is no scope: write {SCOPE_FORMS} (one scope, no pattern)")
    if re.fullmatch(NAME_PATTERN, by) is None:
        raise usage_error(f"--by {by[:100]!r} is no name: 1-64 of A-Z a-z 0-9 . _ + - (no e-mail address)")
    now = from_us(now_us)
    until = now + lasts if lasts is not None else None
    verb = "was halted by" if action == "halt" else "may go on, says"
    what = f" ({budget}, cap {cap})" if budget else ""
    ends = f" Until {until:%Y-%m-%d %H:%M} UTC." if until else ""
    try:
        return Command(
            id=uuid.uuid4().hex,
            seq=now_us // US_PER_MS * SEQ_PER_MS,
            action=action,
            scope=scope,
            budget=budget or MANUAL_BUDGET,
            cap=cap or MANUAL_CAP,
            issued_at=now,
            expires_at=until,
            by=by,
            reason=reason,
            message=f"{scope} {verb} {by}{what}: {reason}.{ends}"[:512],
        )
    except ValidationError as error:
        faults = error.errors(include_input=False, include_url=False)
        raise usage_error(
            "; ".join(f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in faults)
        ) from error


async def _publish(
    where: "Target", draft: "Command", signer: Any, wait_s: float
) -> "tuple[Command, Placed, list[Ack]]":
    """Publish a command above every earlier one of its key, and wait for those it is for."""
    from spendfuse.cli import kafka
    from spendfuse.client.accept import Refused, accept
    from spendfuse.wire.base import SAFE_INTEGER_MAX, encode
    from spendfuse.wire.cloudevents import headers
    from spendfuse.wire.signing import SIGNATURE_HEADER
    from spendfuse.wire.topics import ACKS, COMMANDS

    await kafka.check_topics(where, COMMANDS.name, ACKS.name)
    verifier = where.verifier()
    last = 0

    def look(record: "Record") -> None:
        nonlocal last
        if record.key == draft.key.encode():
            # Only what guards obey counts: a forged sequence must not carry ours to its end.
            with contextlib.suppress(Refused):
                last = max(last, accept(record, verifier, unsigned=verifier is None).seq)

    await kafka.read_to_end(where, {COMMANDS.name: look})
    command = draft.model_copy(update={"seq": min(max(last + 1, draft.seq), SAFE_INTEGER_MAX)})
    key, value = command.key.encode(), encode(command)
    labels = headers("command.v1", "//spendfuse/cli", command.id, command.issued_at)
    if signer is not None:
        labels.append((SIGNATURE_HEADER, signer.sign(COMMANDS.name, key, value)))
    async with kafka.tail(where, ACKS.name) as poll, kafka.sending(where) as send:
        placed = await send(COMMANDS.name, value, key, labels)
        acks = await _acks(poll, command.id, wait_s) if command.action == "halt" else []
    return command, placed, acks


async def _acks(poll: Any, command_id: str, wait_s: float) -> "list[Ack]":
    """Return the acknowledgements of a command that arrive within a time, the last of each guard."""
    import asyncio

    from pydantic import ValidationError

    from spendfuse.wire.control import Ack

    found: dict[str, Ack] = {}
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + wait_s
    while loop.time() < give_up_at:
        for value in await poll(POLL_MS):
            try:
                ack = Ack.model_validate_json(value or b"")
            except ValidationError:
                continue
            if ack.command_id == command_id and (ack.guard in found or len(found) < ACKS_MAX):
                found[ack.guard] = ack
    return sorted(found.values(), key=lambda ack: (ack.agent, ack.guard))
