"""What a guard raises: an agent must stop, or one call does not fit in what is left."""

from typing import Self

from spendfuse.wire.base import rfc3339
from spendfuse.wire.control import Command
from spendfuse.wire.remaining import Remaining


class Halted(Exception):  # noqa: N818 - named by the design
    """The agent must stop: a cap tripped, a person said so, or the guard knows too little to let it go on.

    `command` is the halt that is obeyed, None when there is none to be seen.
    """

    def __init__(self, message: str, command: Command | None = None) -> None:
        super().__init__(message)
        self.command = command

    @classmethod
    def of(cls, command: Command, agent: str) -> Self:
        """Return what an agent (its scope) is told of a halt."""
        what = command.message or f"{command.scope} is halted by budget {command.budget}, cap {command.cap}"
        reason = f" ({command.reason})" if command.reason and command.reason not in what else ""
        until = f", until {rfc3339(command.expires_at)}" if command.expires_at is not None else ""
        return cls(f"{agent} is halted: {what}{reason} [by {command.by}, seq {command.seq}{until}]", command)


class NoRoom(Halted):
    """A call was refused before it started: its upper bound does not fit in what is left of a cap.

    It is not over: a smaller call may fit now, and this one when calls in flight have ended. `remaining` is what the
    guard last heard of the cap, `needed` the call's bound and `left` what was left by the guard's own count, both in
    the cap's unit.
    """

    def __init__(self, message: str, remaining: Remaining, needed: int, left: int) -> None:
        super().__init__(message)
        self.remaining = remaining
        self.needed = needed
        self.left = left
