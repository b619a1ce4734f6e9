"""YAML read as nodes with places: bounded, safe, every mistake kept with its line and column.

Values are taken by their text, so that `id: no` is the name "no" and no type is guessed (YAML 1.1's Norway problem).
"""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, Final, NamedTuple

import yaml

TEXT_CHARS_MAX: Final = 262_144
DEPTH_MAX: Final = 12
NODES_MAX: Final = 50_000
ALIASES_MAX: Final = 100
FAULTS_MAX: Final = 100
"""Faults that are kept; a file with more is the wrong file."""
SHOWN_CHARS_MAX: Final = 80

_STANDARD_TAG: Final = "tag:yaml.org,2002:"
_PLAIN_TAGS: Final = frozenset(
    _STANDARD_TAG + kind
    for kind in ("str", "int", "float", "bool", "null", "timestamp", "seq", "map", "merge", "value")
)


class Fault(NamedTuple):
    """One mistake: where (1-based line and column, and path of keys), what is wrong, what to write instead."""

    line: int
    column: int
    path: str
    problem: str
    instead: str

    def __str__(self) -> str:
        """Return the mistake as one line."""
        where = f"{self.line}:{self.column}: {self.path + ': ' if self.path else ''}"
        return f"{where}{self.problem}{'; ' + self.instead if self.instead else ''}"


class BadValueError(Exception):
    """A value that cannot be used: what is wrong, and what to write instead."""

    def __init__(self, problem: str, instead: str = "") -> None:
        """Keep both sentences."""
        super().__init__(problem)
        self.problem = problem
        self.instead = instead


class UnreadableError(Exception):
    """A text that is no YAML, or more of it than is read; carries the one fault."""

    def __init__(self, fault: Fault) -> None:
        """Keep the fault."""
        super().__init__(str(fault))
        self.fault = fault


def shown(text: str) -> str:
    """Return a value for a sentence: quoted, on one line, not too long."""
    return repr(text if len(text) <= SHOWN_CHARS_MAX else text[: SHOWN_CHARS_MAX - 3] + "...")


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return `write X` for a word that looks like a known one, else the list of what is known."""
    near = get_close_matches(word[:SHOWN_CHARS_MAX].lower(), known, n=1, cutoff=0.6)
    return f"write {near[0]}" if near else f"one of: {', '.join(known)}"


def compose(text: str) -> yaml.Node | None:
    """Return the node of a text's one document, `None` for an empty text.

    Bounded before anything recursive runs: length, depth, nodes, aliases. Raises `UnreadableError`.
    """
    if len(text) > TEXT_CHARS_MAX:
        raise UnreadableError(Fault(1, 1, "", f"the file has more than {TEXT_CHARS_MAX:,} characters", "split it"))
    try:
        _check_bounds(text)
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise UnreadableError(_syntax_fault(error)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        problem = f"character U+{int(error.character):04X} may not be in a YAML file"
        raise UnreadableError(Fault(line, column, "", problem, "remove it, or save the file as UTF-8")) from error
    except (ValueError, OverflowError) as error:  # an escape such as "\UFFFFFFFF" that names no character
        raise UnreadableError(Fault(1, 1, "", f"not YAML: {error}", "check the escapes in quoted text")) from error


def _check_bounds(text: str) -> None:
    depth = nodes = aliases = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        nodes += isinstance(event, yaml.NodeEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        for count, bound, what in (
            (depth, DEPTH_MAX, "levels of nesting"),
            (nodes, NODES_MAX, "values"),
            (aliases, ALIASES_MAX, "aliases (*name)"),
        ):
            if count > bound:
                line, column = _place(event.start_mark)
                raise UnreadableError(Fault(line, column, "", f"more than {bound:,} {what}", "write it out plainly"))


def _place(mark: Any) -> tuple[int, int]:
    """Return line and column of a mark, counted from 1."""
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)


def _syntax_fault(error: yaml.MarkedYAMLError) -> Fault:
    line, column = _place(error.problem_mark or error.context_mark)
    problem = " ".join(part for part in (error.context, error.problem) if part)
    instead = ""
    if "'\\t'" in problem:
        instead = "indent with spaces, not with a tab"
    elif "mapping values are not allowed" in problem:
        instead = "check the indentation, and quote a value that contains ': '"
    elif "single document" in problem:
        instead = "remove the second '---'"
    elif "alphanumeric" in problem or "alias" in problem:
        instead = "quote a value that starts with * or &"
    return Fault(line, column, "", f"not YAML: {problem}", instead)


class NodeReader:
    """Reads nodes by the shape that is expected, and keeps each fault instead of stopping at it."""

    def __init__(self) -> None:
        """Start without faults."""
        self.faults: list[Fault] = []

    def fault(self, node: yaml.Node, path: str, problem: str, instead: str = "") -> None:
        """Keep a fault; beyond `FAULTS_MAX` they are no longer kept."""
        if len(self.faults) < FAULTS_MAX:
            line, column = _place(node.start_mark)
            self.faults.append(Fault(line, column, path, problem, instead))

    def mapping(
        self, node: yaml.Node, path: str, known: Sequence[str], synonyms: dict[str, str] | None = None
    ) -> dict[str, yaml.Node]:
        """Return the values of the known keys; unknown and repeated keys are faults."""
        values: dict[str, yaml.Node] = {}
        for key, value, key_node in self.pairs(node, path):
            if key in known:
                values[key] = value
            elif key == "<<":
                self.fault(key_node, path, "merge keys (<<) are not read", "write the keys out")
            else:
                other = (synonyms or {}).get(key.lower())
                self.fault(key_node, path, f"unknown key {shown(key)}", other or did_you_mean(key, known))
        return values

    def pairs(self, node: yaml.Node, path: str) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        """Yield key, value and the key's node of a mapping; the second of two equal keys is a fault, not a value."""
        if not isinstance(node, yaml.MappingNode) or node.tag not in _PLAIN_TAGS:
            self.fault(node, path, f"expected keys and values, found {_kind(node)}", "write 'key: value' lines")
            return
        first: dict[str, int] = {}
        for key_node, value in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.fault(key_node, path, "a key must be a plain word", "quote it, or check the braces")
                continue
            key = key_node.value
            if key in first:
                self.fault(key_node, path, f"key {shown(key)} stands twice, first in line {first[key]}", "keep one")
                continue
            first[key] = key_node.start_mark.line + 1
            yield key, value, key_node

    def items(self, node: yaml.Node, path: str, items_max: int) -> list[yaml.Node]:
        """Return the items of a list; more than `items_max` is a fault."""
        if not isinstance(node, yaml.SequenceNode) or node.tag not in _PLAIN_TAGS:
            self.fault(node, path, f"expected a list, found {_kind(node)}", "start each item with '- '")
            return []
        if len(node.value) > items_max:
            self.fault(node, path, f"{len(node.value)} items, at most {items_max} are allowed", "split the list")
        return list(node.value[:items_max])

    def text(self, node: yaml.Node, path: str, example: str) -> str | None:
        """Return a scalar's text as written; `None` and a fault for anything else, and for nothing."""
        if not isinstance(node, yaml.ScalarNode):
            self.fault(node, path, f"expected one value, found {_kind(node)}", f"write {example}")
            return None
        if node.tag not in _PLAIN_TAGS:
            self.fault(node, path, f"the tag {shown(node.tag)} is not read", f"write {example}")
            return None
        if not node.value.strip() or node.tag == _STANDARD_TAG + "null":
            self.fault(node, path, "is empty", f"write {example}")
            return None
        return str(node.value).strip()


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "keys and values"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return f"the value {shown(node.value)}" if node.value else "nothing"
