"""Whose money this process spends: checked once, so that every usage made from it is valid."""

import functools
import uuid
from dataclasses import dataclass
from typing import Self

from pydantic import TypeAdapter, ValidationError

from spendfuse.settings import IdentitySettings, SettingsError
from spendfuse.wire.base import Id, Name
from spendfuse.wire.scopes import agent_scope, ancestors

_NAME = TypeAdapter(Name)
_ID = TypeAdapter(Id)


@functools.cache
def process_run() -> str:
    """Return the run id of this process, made at the first call; a forked child belongs to its parent's run."""
    return f"run-{uuid.uuid4().hex}"


@dataclass(frozen=True, slots=True)
class Identity:
    """Workspace, team, agent and run; `root_run` and `parent_run` are None for a run of its own."""

    workspace: str
    team: str
    agent: str
    run: str
    root_run: str | None = None
    parent_run: str | None = None

    @classmethod
    def of(cls, settings: IdentitySettings) -> Self:
        """Return the identity of the settings, with the process's run if none is given.

        Raises SettingsError naming every variable at fault.
        """
        faults = []
        for field, adapter in (
            *(("workspace", _NAME), ("team", _NAME), ("agent", _NAME)),
            *(("run", _ID), ("root_run", _ID), ("parent_run", _ID)),
        ):
            value = getattr(settings, field)
            if not value and adapter is _ID:
                continue
            try:
                adapter.validate_python(value)
            except ValidationError as error:
                faults.append(f"  SPENDFUSE_{field.upper()}: {value!r}: {error.errors()[0]['msg']}")
        if faults:
            raise SettingsError("settings cannot be used:\n" + "\n".join(faults))
        run = settings.run or process_run()
        return cls(
            *(settings.workspace, settings.team, settings.agent, run),
            root_run=settings.root_run if settings.root_run not in ("", run) else None,
            parent_run=settings.parent_run or None,
        )

    @property
    def agent_path(self) -> str:
        """Return `workspace/team/agent`, the Kafka key of its usages."""
        return f"{self.workspace}/{self.team}/{self.agent}"

    @property
    def agent_scope(self) -> str:
        """Return `agent:workspace/team/agent`."""
        return agent_scope(self.workspace, self.team, self.agent)

    @property
    def scopes(self) -> tuple[str, ...]:
        """Return every scope whose halt stops this agent, its own first."""
        return ancestors(self.workspace, self.team, self.agent, self.root_run or self.run)
