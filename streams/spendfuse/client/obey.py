"""What a guard has been told, and what it must do now. Pure: the time is an argument.

The answer depends on the set of commands applied, not on their order or number:
- for each scope, budget and cap the command of the highest `seq` rules (halt, degrade or resume);
- a warning is no ruling: it neither raises nor lowers what holds;
- a ruling past its `expires_at` lapses, and what it replaced stays replaced;
- the strictest ruling over all the guard's scopes wins.
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Final, Literal, NamedTuple

from spendfuse.wire.base import to_us
from spendfuse.wire.control import Command

RULINGS_MAX: Final = 10_000
"""Most (scope, budget, cap) remembered; beyond it only a halt is taken in."""

Applied = Literal["ruling", "warning", "old", "elsewhere", "full"]


class Verdict(NamedTuple):
    """What holds at one time: the halts, then the degrades, each ordered by scope (the agent's own first) and key."""

    halts: tuple[Command, ...]
    degrades: tuple[Command, ...]
    changes_at_us: int | None
    """When the first of them lapses, if nothing else is said; None if none does."""

    @property
    def halt(self) -> Command | None:
        """Return the halt to obey, None if there is none."""
        return self.halts[0] if self.halts else None

    @property
    def action(self) -> Literal["halt", "degrade", "go"]:
        """Return the strictest thing that holds."""
        return "halt" if self.halts else "degrade" if self.degrades else "go"

    def model(self, name: str) -> str:
        """Return the model to use for a model: an exact entry of a degrade before a pattern, a longer one first.

        The nearest scope wins, and a model that is put in another's place is not replaced once more.
        """
        for command in self.degrades:
            models = command.degrade.models if command.degrade is not None else {}
            if name in models:
                return models[name]
            for pattern in sorted(models, key=lambda text: (-len(text), text)):
                if fnmatchcase(name, pattern):
                    return models[pattern]
        return name

    @property
    def max_output_tokens(self) -> int | None:
        """Return the least `max_output_tokens` of the degrades, None if none says."""
        limits = [
            command.degrade.max_output_tokens
            for command in self.degrades
            if command.degrade is not None and command.degrade.max_output_tokens is not None
        ]
        return min(limits, default=None)


NOTHING: Final = Verdict((), (), None)


class Obedience:
    """The commands that rule a set of scopes."""

    def __init__(self, scopes: Sequence[str] | None) -> None:
        """`scopes` in the order in which their rulings are named; None for every scope there is."""
        self._all = scopes is None
        self._rank = {scope: rank for rank, scope in enumerate(scopes or ())}
        self._rulings: dict[str, Command] = {}
        self._warnings: dict[str, Command] = {}

    def concerns(self, scope: str) -> bool:
        """Say whether commands for a scope rule this guard."""
        return self._all or scope in self._rank

    def apply(self, command: Command) -> Applied:
        """Take in a command whose signature and key are known to be right; say what it was worth."""
        if not self.concerns(command.scope):
            return "elsewhere"
        warning = command.action == "warn"
        kept = self._warnings if warning else self._rulings
        before = kept.get(command.key)
        if before is not None and _rank(command) <= _rank(before):
            return "old"
        if before is None and len(kept) >= RULINGS_MAX and command.action != "halt":
            return "full"
        kept[command.key] = command
        return "warning" if warning else "ruling"

    def strictest(self, now_us: int) -> Verdict:
        """Return what holds at a time, in microseconds since the epoch."""
        holding = [
            command for command in self._rulings.values() if command.action != "resume" and _holds(command, now_us)
        ]
        if not holding:
            return NOTHING
        holding.sort(key=lambda command: (self._rank.get(command.scope, 0), command.key))
        return Verdict(
            tuple(command for command in holding if command.action == "halt"),
            tuple(command for command in holding if command.action == "degrade"),
            min((to_us(command.expires_at) for command in holding if command.expires_at is not None), default=None),
        )

    def warnings(self, now_us: int) -> list[Command]:
        """Return the warnings that hold at a time, by key."""
        return _holding(self._warnings.values(), now_us)


def expired(command: Command, now_us: int) -> bool:
    """Say whether a command has lapsed."""
    return not _holds(command, now_us)


def _holding(commands: Iterable[Command], now_us: int) -> list[Command]:
    return sorted((command for command in commands if _holds(command, now_us)), key=lambda command: command.key)


def _holds(command: Command, now_us: int) -> bool:
    return command.expires_at is None or to_us(command.expires_at) > now_us


def _rank(command: Command) -> tuple[int, int, str]:
    # Two commands of one seq are a writer's fault; every guard must still rule alike, and on the safe side.
    return command.seq, ("warn", "resume", "degrade", "halt").index(command.action), command.id
