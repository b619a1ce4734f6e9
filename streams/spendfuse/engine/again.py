"""What was said before a crash is not said anew: decisions that no usage led to, found again in what was sent.

A decision that follows from a usage has that usage's time, so a replay gives its command again, id and sequence alike.
What follows from a changed budget, from a deadline or from the start of a worker has the time of the clock. After a
crash between its command and its state it is taken once more, later: then the command that lies in its topic counts.

And what a replay will not say again must be known to be taken back: a halt that no usage led to (calls in flight that
tripped a changed budget may have ended since), or one under a budget that has changed since.
"""

from collections.abc import Callable, Iterable, Mapping

from spendfuse.engine.decide import CALLS_ENDED
from spendfuse.engine.orders import Effects, alert_id
from spendfuse.engine.policies import Policies
from spendfuse.engine.recall import recall
from spendfuse.engine.state import Fuse
from spendfuse.wire.base import to_us
from spendfuse.wire.control import MANUAL_BUDGET, Command

Said = Callable[[str], Iterable[Command]]
"""The latest genuine command of each budget and cap of a scope."""


def recall_unknown(scope: str, fuses: dict[str, Fuse], policies: Policies, said: Said, now_us: int) -> bool:
    """Bring fuses up to commands that the state does not know and that no replay gives again; say whether any changed.

    A halt or degrade that no usage led to, or under a former version of its budget, comes back whole, to be lifted or
    confirmed while it stands; of a resume that no usage led to the sequence does, so that the next command is newer.
    """
    changed = False
    for told in said(scope):
        name = f"{told.budget}|{told.cap}"
        known = fuses.get(name)
        if told.budget == MANUAL_BUDGET or told.seq <= (known.seq if known is not None else 0):
            continue
        budget = policies.budgets.get(told.budget)
        stands = told.expires_at is None or to_us(told.expires_at) > now_us
        unsayable = told.cause is None or budget is None or budget.version > told.budget_version
        if told.action in ("halt", "degrade") and stands and unsayable:
            recall(fuses, told, policies, sent=True)
            changed = True
        elif told.action == "resume" and told.reason != CALLS_ENDED and known is None:
            fuses[name] = Fuse(told.seq)
            changed = True
    return changed


def sequences_of(fuses: Mapping[str, Fuse]) -> dict[str, int]:
    """Return the sequence of each fuse, to be taken before a decision for `unsaid`."""
    return {key: fuse.seq for key, fuse in fuses.items()}


def unsaid(
    effects: Effects | None, fuses: Mapping[str, Fuse], before: Mapping[str, int], said: Iterable[Command]
) -> Effects | None:
    """Return effects without the commands that had been sent already and that the state did not know.

    The fuses take over the sequences of those, and the alerts about them their ids: an alert may not have been sent.
    `before` are the sequences of the fuses before the decision, `said` the latest command of each budget and cap.
    """
    if effects is None or not effects.commands:
        return effects
    ordered = {command.key for command in effects.commands}
    for told in said:
        key, name = told.key, f"{told.budget}|{told.cap}"
        if key not in ordered or told.seq <= before.get(name, 0):
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
