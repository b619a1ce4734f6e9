"""The budget file a team lead writes: YAML in, budgets out, every mistake at once with its line.

Semantics: an amount is exact (decimal text to integer nano-units or tokens); a fraction is per cent of the cap; a
budget's zone is its own, else its workspace's, else UTC; a cap's id is derived from window and unit when not given.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import yaml
from pydantic import ValidationError

from spendfuse.adapters import budget_values as values
from spendfuse.adapters.yaml_nodes import (
    FAULTS_MAX,
    TEXT_CHARS_MAX,
    BadValueError,
    Fault,
    NodeReader,
    UnreadableError,
    compose,
    shown,
)
from spendfuse.wire.budget import (
    CAPS_MAX,
    WARNS_MAX,
    Budget,
    Cap,
    DegradeRule,
    WorkspaceSettings,
)

FILE_VERSION: Final = "1"
BUDGETS_MAX: Final = 1_000
MODELS_MAX: Final = 64
TOP_KEYS: Final = ("version", "workspaces", "budgets")
BUDGET_KEYS: Final = (
    "id",
    "scope",
    "timezone",
    "unknown_model",
    "shadow",
    "count_holds",
    "grace",
    "note",
    "caps",
)
CAP_KEYS: Final = ("id", "amount", "window", "warn", "degrade", "halt")
DEGRADE_KEYS: Final = ("at", "models", "max_output_tokens")
BUDGET_SYNONYMS: Final = {
    "name": "write id",
    "tz": "write timezone",
    "zone": "write timezone",
    "limits": "write caps",
    "cap": "write caps, and a list under it",
    "agent": "write scope: agent:workspace/team/agent",
    "team": "write scope: team:workspace/team",
    "workspace": "write scope: workspace:name",
    "dry_run": "write shadow: true",
    "amount": "put it under caps",
    "window": "put it under caps",
    "warn": "put it under caps",
    "halt": "put it under caps",
    "degrade": "put it under caps",
}
CAP_SYNONYMS: Final = {
    "limit": "write amount",
    "max": "write amount",
    "usd": "write amount: 50 USD",
    "tokens": "write amount: 5M tokens",
    "period": "write window",
    "per": "write window",
    "thresholds": "write warn: [50%, 80%]",
    "alert": "write warn: [50%, 80%]",
    "kill": "write halt",
    "stop": "write halt",
}

T = TypeVar("T")


class Note(NamedTuple):
    """Something a reader of the file should know that is no mistake."""

    line: int
    path: str
    text: str

    def __str__(self) -> str:
        """Return the note as one line."""
        return f"{self.line}: {self.path}: {self.text}"


class BudgetFile(NamedTuple):
    """What a budget file says; each budget has version 1 until `with_versions`."""

    budgets: tuple[Budget, ...]
    workspaces: tuple[WorkspaceSettings, ...]
    notes: tuple[Note, ...]


class BudgetFileError(Exception):
    """A budget file that cannot be used, with all its faults in the order of the file."""

    def __init__(self, name: str, faults: Sequence[Fault]) -> None:
        """Keep the faults; the message has one line for each."""
        self.faults = sorted(faults)
        counted = f"{len(faults)} mistake{'s' if len(faults) != 1 else ''}"
        if len(faults) >= FAULTS_MAX:
            counted = f"the first {FAULTS_MAX} mistakes"
        super().__init__(f"{name}: {counted}\n" + "\n".join(f"  {name}:{fault}" for fault in self.faults))


def parse(text: str, *, name: str, currency: str = "USD", zones: Mapping[str, str] | None = None) -> BudgetFile:
    """Return the budgets and workspace settings of a file.

    `name` stands in messages; `currency` is the price book's; `zones` are time zones of workspaces already applied,
    which the file's own come before. Raises `BudgetFileError` with every fault.
    """
    reader = _Reader(currency, dict(zones or {}))
    try:
        node = compose(text.removeprefix("\ufeff"))
    except UnreadableError as error:
        raise BudgetFileError(name, [error.fault]) from error
    if node is None:
        raise BudgetFileError(name, [Fault(1, 1, "", "the file is empty", "write version: 1 and budgets:")])
    found = reader.file(node)
    if reader.faults:
        raise BudgetFileError(name, reader.faults)
    return found


def load(path: Path, *, currency: str = "USD", zones: Mapping[str, str] | None = None) -> BudgetFile:
    """Return what the budget file at `path` says; as `parse`, also for a file that cannot be read."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(TEXT_CHARS_MAX + 1)
    except OSError as error:
        fault = Fault(1, 1, "", f"the file cannot be read: {error.strerror or error}", "check its name and rights")
        raise BudgetFileError(str(path), [fault]) from error
    except UnicodeDecodeError as error:
        raise BudgetFileError(str(path), [Fault(1, 1, "", "the file is not UTF-8", "save it as UTF-8")]) from error
    return parse(text, name=str(path), currency=currency, zones=zones)


def with_versions(new: Iterable[Budget], current: Mapping[str, Budget]) -> list[Budget]:
    """Return budgets with the version each should have: its current one if nothing differs, else the next.

    `current` is by budget id. What was applied when is no difference.
    """
    versioned: list[Budget] = []
    for budget in new:
        known = current.get(budget.id)
        if known is None:
            version, applied_at = 1, budget.applied_at
        elif _content(known) == _content(budget):
            version, applied_at = known.version, known.applied_at
        else:
            version, applied_at = known.version + 1, budget.applied_at
        versioned.append(budget.model_copy(update={"version": version, "applied_at": applied_at}))
    return versioned


def _content(budget: Budget) -> dict[str, object]:
    return budget.model_dump(exclude={"version", "applied_at"})


def dump(budget: Budget) -> str:
    """Return a budget as one line for a list."""
    caps = "; ".join(_cap_line(cap) for cap in budget.caps)
    traits = [budget.timezone]
    if budget.unknown_model != "ceiling":
        traits.append(f"unknown models: {budget.unknown_model}")
    if budget.shadow:
        traits.append("shadow")
    return f"{budget.id} v{budget.version}  {budget.scope}  {caps}  ({', '.join(traits)})"


def _cap_line(cap: Cap) -> str:
    window = cap.window.label if cap.window.kind == "rolling" else f"a {cap.window.kind}"
    does = [f"warn {' '.join(values.per_cent(at) for at in cap.warn)}"] if cap.warn else []
    if cap.degrade is not None:
        does.append(f"degrade {values.per_cent(cap.degrade.at)}")
    does.append("halt" if cap.halt else "no halt")
    return f"{values.amount_text(cap.amount, cap.unit)} {window}: {', '.join(does)}"


class _Reader(NodeReader):
    """Reads the shape of a budget file from nodes."""

    def __init__(self, currency: str, zones: dict[str, str]) -> None:
        super().__init__()
        self.currency = currency
        self.zones = zones
        self.notes: list[Note] = []

    def value(self, node: yaml.Node, path: str, read: Callable[[str], T], example: str) -> T | None:
        """Return a scalar read, or keep why it cannot be."""
        text = self.text(node, path, example)
        if text is None:
            return None
        try:
            return read(text)
        except BadValueError as error:
            self.fault(node, path, error.problem, error.instead)
            return None

    def optional(
        self, keys: Mapping[str, yaml.Node], key: str, path: str, read: Callable[[str], T], example: str, default: T
    ) -> T:
        """Return the value of a key that may be missing."""
        if key not in keys:
            return default
        found = self.value(keys[key], f"{path}.{key}", read, example)
        return default if found is None else found

    def file(self, node: yaml.Node) -> BudgetFile:
        keys = self.mapping(node, "", TOP_KEYS)
        if "version" not in keys:
            self.fault(node, "version", "is missing", "write version: 1")
        elif (version := self.text(keys["version"], "version", "1")) not in (None, FILE_VERSION):
            self.fault(keys["version"], "version", f"version {shown(version or '')} is unknown", "write version: 1")
        workspaces: tuple[WorkspaceSettings, ...] = ()
        if "workspaces" in keys:
            workspaces = self._workspaces(keys["workspaces"])
        if "budgets" not in keys and "workspaces" not in keys:
            self.fault(node, "budgets", "is missing", "write budgets: and a list under it")
        budgets: list[Budget] = []
        first_line: dict[str, int] = {}
        for index, item in enumerate(self.items(keys["budgets"], "budgets", BUDGETS_MAX) if "budgets" in keys else ()):
            path = f"budgets[{index}]"
            budget = self._budget(item, path, first_line)
            if budget is not None:
                budgets.append(budget)
        return BudgetFile(tuple(budgets), workspaces, tuple(self.notes))

    def _workspaces(self, node: yaml.Node) -> tuple[WorkspaceSettings, ...]:
        found: list[WorkspaceSettings] = []
        for name, value, key_node in self.pairs(node, "workspaces"):
            path = f"workspaces.{name}"
            try:
                values.name(name)
            except BadValueError as error:
                self.fault(key_node, "workspaces", error.problem, error.instead)
                continue
            keys = self.mapping(value, path, ("timezone",), {"tz": "write timezone", "zone": "write timezone"})
            if "timezone" not in keys:
                if isinstance(value, yaml.MappingNode) and not value.value:
                    self.fault(key_node, path, "timezone is missing", "write {timezone: Europe/Amsterdam}")
                continue
            zone = self.value(keys["timezone"], f"{path}.timezone", values.timezone, "Europe/Amsterdam")
            if zone is not None:
                self.zones[name] = zone
                found.append(WorkspaceSettings(workspace=name, timezone=zone))
        return tuple(found)

    def _required(
        self,
        keys: Mapping[str, yaml.Node],
        key: str,
        parent: yaml.Node,
        path: str,
        read: Callable[[str], T],
        example: str,
    ) -> T | None:
        if key not in keys:
            if isinstance(parent, yaml.MappingNode):
                self.fault(parent, f"{path}.{key}", "is missing", f"write {key}: {example}")
            return None
        return self.value(keys[key], f"{path}.{key}", read, example)

    def _budget(self, node: yaml.Node, path: str, first_line: dict[str, int]) -> Budget | None:
        keys = self.mapping(node, path, BUDGET_KEYS, BUDGET_SYNONYMS)
        budget_id = self._required(keys, "id", node, path, values.name, "research-agents")
        if budget_id is not None:
            if budget_id in first_line:
                problem = f"the id {shown(budget_id)} stands already in line {first_line[budget_id]}"
                self.fault(keys["id"], f"{path}.id", problem, "give each budget an id of its own")
            first_line.setdefault(budget_id, keys["id"].start_mark.line + 1)
        scope = self._required(keys, "scope", node, path, values.scope_pattern, "agent:acme/research/*")
        workspace = scope.partition(":")[2].partition("/")[0] if scope else ""
        zone = self.optional(
            keys, "timezone", path, values.timezone, "Europe/Amsterdam", self.zones.get(workspace, "UTC")
        )
        policy = self.optional(keys, "unknown_model", path, values.unknown_model, "ceiling", "ceiling")
        shadow = self.optional(keys, "shadow", path, values.flag, "false", default=False)
        count_holds = self.optional(keys, "count_holds", path, values.flag, "true", default=True)
        grace_s = self.optional(keys, "grace", path, values.duration_s, "1h", 3_600)
        note = self.optional(keys, "note", path, values.note, "a line", "")
        caps = self._caps(keys, node, path, scope, workspace, zone)
        if budget_id is None or scope is None or not caps:
            return None
        try:
            return Budget.model_validate(
                {
                    "id": budget_id,
                    "version": 1,
                    "scope": scope,
                    "timezone": zone,
                    "caps": caps,
                    "unknown_model": policy,
                    "shadow": shadow,
                    "count_holds": count_holds,
                    "grace_s": grace_s,
                    "note": note,
                }
            )
        except ValidationError as error:  # a rule of the wire model that this file has no sentence for
            for fault in error.errors(include_input=False, include_url=False, include_context=False):
                where = ".".join(str(part) for part in fault["loc"])
                self.fault(node, f"{path}.{where}" if where else path, fault["msg"])
            return None

    def _caps(
        self, keys: Mapping[str, yaml.Node], parent: yaml.Node, path: str, scope: str | None, workspace: str, zone: str
    ) -> list[Cap]:
        if "caps" not in keys:
            if isinstance(parent, yaml.MappingNode):
                self.fault(parent, f"{path}.caps", "is missing", "write caps: and a list under it")
            return []
        items = self.items(keys["caps"], f"{path}.caps", CAPS_MAX)
        if not items and isinstance(keys["caps"], yaml.SequenceNode):
            self.fault(keys["caps"], f"{path}.caps", "is empty", "write at least one cap")
        caps: list[Cap] = []
        for index, item in enumerate(items):
            cap_path = f"{path}.caps[{index}]"
            cap = self._cap(item, cap_path, scope)
            if cap is None:
                continue
            if any(other.id == cap.id for other in caps):
                problem = f"two caps of this budget are called {shown(cap.id)}"
                self.fault(item, cap_path, problem, "give this one an id of its own")
                continue
            caps.append(cap)
            self._notes_on(cap, item, cap_path, workspace, zone)
        return caps

    def _cap(self, node: yaml.Node, path: str, scope: str | None) -> Cap | None:
        keys = self.mapping(node, path, CAP_KEYS, CAP_SYNONYMS)
        sized = self._required(keys, "amount", node, path, lambda text: values.amount(text, self.currency), "50 USD")
        spec = self._required(keys, "window", node, path, values.window, "day")
        given_id = self._required(keys, "id", node, path, values.name, "day-usd") if "id" in keys else None
        warns = self._warns(keys["warn"], f"{path}.warn") if "warn" in keys else []
        degrade = self._degrade(keys["degrade"], f"{path}.degrade") if "degrade" in keys else None
        halt = self.optional(keys, "halt", path, values.flag, "true", default=True)
        if spec is not None and spec.kind == "run" and scope is not None and not scope.startswith("run:"):
            problem = f"window run needs a scope run:..., but the scope is {scope}"
            self.fault(keys["window"], f"{path}.window", problem, "write scope: run:workspace/*, or another window")
            return None
        if sized is None or spec is None:
            return None
        size, unit = sized
        derived = f"{spec.label.replace(' ', '-')}-{unit.removeprefix('nano-').lower()}"
        return Cap(id=given_id or derived, unit=unit, amount=size, window=spec, warn=warns, degrade=degrade, halt=halt)

    def _warns(self, node: yaml.Node, path: str) -> list[int]:
        single = isinstance(node, yaml.ScalarNode)
        nodes = [node] if single else self.items(node, path, WARNS_MAX)
        found: list[int] = []
        for index, item in enumerate(nodes):
            item_path = path if single else f"{path}[{index}]"
            value = self.value(item, item_path, values.fraction, "80%")
            if value is not None and value in found:
                self.fault(item, item_path, f"{values.per_cent(value)} stands twice", "keep one")
            elif value is not None:
                found.append(value)
        return sorted(found)

    def _degrade(self, node: yaml.Node, path: str) -> DegradeRule | None:
        keys = self.mapping(
            node, path, DEGRADE_KEYS, {"model": "write models", "max_tokens": "write max_output_tokens"}
        )
        at = self._required(keys, "at", node, path, values.fraction, "90%")
        models: dict[str, str] = {}
        if "models" in keys:
            for model, value, key_node in self.pairs(keys["models"], f"{path}.models"):
                try:
                    values.model_in_use(model)
                except BadValueError as error:
                    self.fault(key_node, f"{path}.models", error.problem, error.instead)
                    continue
                name = self.value(value, f"{path}.models.{model}", values.model, "claude-haiku-4-5")
                if name is not None:
                    models[model] = name
            if len(models) > MODELS_MAX:
                self.fault(keys["models"], f"{path}.models", f"more than {MODELS_MAX} models", "name fewer")
                return None
        longest: int | None = None
        if "max_output_tokens" in keys:
            longest = self.value(keys["max_output_tokens"], f"{path}.max_output_tokens", values.output_tokens, "512")
        if isinstance(node, yaml.MappingNode) and not {"models", "max_output_tokens"} & keys.keys():
            self.fault(node, path, "asks for nothing", "write models: {old: new} or max_output_tokens: 512")
        return None if at is None else DegradeRule(at=at, models=models, max_output_tokens=longest)

    def _notes_on(self, cap: Cap, node: yaml.Node, path: str, workspace: str, zone: str) -> None:
        line = node.start_mark.line + 1
        home = self.zones.get(workspace, "UTC")
        any_workspace = "*" in workspace or "?" in workspace
        if cap.window.kind in ("hour", "day", "month") and (any_workspace or zone != home):
            keeps = "a workspace may keep another" if any_workspace else f"the workspace keeps {home}"
            text = (
                f"its {cap.window.kind} is that of {zone}, while {keeps}: "
                f"then its first {cap.window.kind} counts from when it is applied"
            )
            self.notes.append(Note(line, path, text))
        if not cap.halt and not cap.warn and cap.degrade is None:
            self.notes.append(Note(line, path, "it neither warns, degrades nor halts: it only shows"))
