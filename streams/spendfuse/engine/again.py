"""What was said before a crash is not said anew: decisions that no usage led to, found again in what was sent.

A decision that follows from a usage has that usage's time, so a replay gives its command again, id and sequence alike.
What follows from a changed budget, from a deadline or from the start of a worker has the time of the clock. After a
crash between its command and its state it is taken once more, later: then the command that lies in its topic counts.
"""

from collections.abc import Callable, Mapping

from spendfuse.engine.orders import Effects, alert_id
from spendfuse.engine.state import Fuse
from spendfuse.wire.control import Command

Latest = Callable[[str], Command | None]
"""The latest genuine command of a key `scope|budget|cap`; None where none is known."""


def sequences_of(fuses: Mapping[str, Fuse]) -> dict[str, int]:
    """Return the sequence of each fuse, to be taken before a decision for `unsaid`."""
    return {key: fuse.seq for key, fuse in fuses.items()}


def unsaid(
    effects: Effects | None, fuses: Mapping[str, Fuse], before: Mapping[str, int], latest: Latest
) -> Effects | None:
    """Return effects without the commands that had been sent already and that the state did not know.

    The fuses take over the sequences of those, and the alerts about them their ids: an alert may not have been sent.
    `before` are the sequences of the fuses before the decision.
    """
    if effects is None or not effects.commands:
        return effects
    for key in dict.fromkeys(command.key for command in effects.commands):
        told = latest(key)
        name = key.partition("|")[2]
        if told is None or told.seq <= before.get(name, 0):
            continue
        ours = [command for command in effects.commands if command.key == key]
        same = next((nth for nth in reversed(range(len(ours))) if _says(ours[nth]) == _says(told)), None)
        if same is None:
            continue
        if same == len(ours) - 1:
            fuses[name].seq = told.seq
        _take_out(effects, ours[: same + 1], told)
    return effects


def _take_out(effects: Effects, said: list[Command], told: Command) -> None:
    """Take out commands of which `told` is the last; only its alert may be missing."""
    gone = {command.id for command in said}
    effects.commands = [command for command in effects.commands if command.id not in gone]
    ids = {alert_id(command.id): command for command in said}
    effects.alerts = [
        alert.model_copy(update={"id": alert_id(told.id)}) if alert.id in ids else alert
        for alert in effects.alerts
        if alert.id not in ids or ids[alert.id] is said[-1]
    ]


def _says(command: Command) -> tuple[object, ...]:
    """Return what a guard is told; numbers, times, reasons and sentences may differ from one look to the next."""
    return command.action, command.budget_version, command.window, command.expires_at, command.degrade
