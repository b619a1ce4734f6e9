"""What an operator does, said in the ledger before it is done: who, what, when and why."""

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

if TYPE_CHECKING:
    from spendfuse.cli.target import Target
    from spendfuse.client.keys import Signer

REASON_CHARS_MAX: Final = 300
NAMED_MAX: Final = 100
"""Most things an entry names; of more it says how many there are."""
UNNAMED: Final = "unnamed"

By = Annotated[str, typer.Option(metavar="NAME", help="Who does it; the ledger keeps it. No e-mail address.")]
Reason = Annotated[str, typer.Option(metavar="TEXT", help="Why; the ledger keeps it.")]
Whoever = Annotated[
    str, typer.Option("--by", metavar="NAME", help="Who does it, for the ledger; the login name by default.")
]


def who(where: "Target", by: str, reason: str) -> "Signer | None":
    """Return what signs for a person; raises a usage error when it is not said who, or why."""
    check(by, reason)
    return where.signer()


def check(by: str, reason: str, *, needs_reason: bool = True) -> None:
    """Raise a usage error for a name that is none, and for a reason that is none or too long."""
    from spendfuse.cli.faults import usage_error
    from spendfuse.wire.base import LINE_PATTERN, NAME_PATTERN

    if re.fullmatch(NAME_PATTERN, by) is None:
        raise usage_error(f"--by {by[:100]!r} is no name: 1-64 of A-Z a-z 0-9 . _ + - (no e-mail address)")
    if not reason and not needs_reason:
        return
    if not 0 < len(reason) <= REASON_CHARS_MAX or re.fullmatch(LINE_PATTERN, reason) is None:
        raise usage_error(f"--reason is one line of at most {REASON_CHARS_MAX} characters: say why")


def named(by: str, reason: str) -> str:
    """Return who does it: the name given, else the login name; raises a usage error for what is no name or reason."""
    import getpass

    from spendfuse.wire.base import NAME_PATTERN

    if not by:
        try:
            by = getpass.getuser()
        except (KeyError, OSError):
            by = UNNAMED
        by = by if re.fullmatch(NAME_PATTERN, by) else UNNAMED
    check(by, reason, needs_reason=False)
    return by


async def send(
    where: "Target", action: str, about: dict[str, Any], by: str, reason: str, at: datetime, signer: "Signer | None"
) -> None:
    """Write the entry to the ledger, and return once every replica has it; raises CliError, so nothing else is done."""
    from spendfuse.audit import operator
    from spendfuse.cli import console, kafka
    from spendfuse.wire.topics import LEDGER

    value = operator.message(action, about, by=by, reason=reason, at=at, signer=signer)
    await kafka.check_topics(where, LEDGER.name)
    async with kafka.sending(where) as put:
        placed = await put(LEDGER.name, value, operator.KEY, [])
    console.note(f"written to the ledger (partition {placed.partition}, offset {placed.offset})")


def record(
    where: "Target", action: str, about: dict[str, Any], by: str, reason: str, at: datetime, signer: "Signer | None"
) -> None:
    """Write the entry, as `send` does."""
    from spendfuse.cli import kafka

    kafka.run(send(where, action, about, by, reason, at, signer))


async def send_as(where: "Target", action: str, about: dict[str, Any], by: str, reason: str) -> None:
    """Write the entry, signed where there is a key to sign with."""
    await send(where, action, about, by, reason, datetime.now(UTC), signer_if_any(where))


def record_if_possible(
    where: "Target", action: str, about: dict[str, Any], by: str, reason: str, signer: "Signer | None"
) -> None:
    """Write the entry of what must be possible without Kafka too; without it that is said, and the rest is done."""
    from spendfuse.cli import console
    from spendfuse.cli.faults import CliError

    try:
        record(where, action, about, by, reason, datetime.now(UTC), signer)
    except CliError as error:
        console.note(f"the ledger has no entry of this: {error}", "yellow")


def signer_if_any(where: "Target") -> "Signer | None":
    """Return what signs where a key is given, None where none is; raises SettingsError for a key that is none."""
    return where.signer() if where.operator.signing_key.get_secret_value() else None


def some(names: "list[Any]") -> "list[Any]":
    """Return at most NAMED_MAX of them."""
    return names[:NAMED_MAX]
