"""Write the language-neutral contract from the models of `spendfuse.wire`: JSON Schema, AsyncAPI, table of topics.

python schemas/generate.py            writes schemas/json/, schemas/asyncapi.yaml and schemas/topics.md
python schemas/generate.py --check    writes nothing; prints a diff and ends with 1 when a file is not current
"""

import argparse
import difflib
import json
import sys
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

HERE: Final = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "streams"))

from spendfuse import wire  # noqa: E402 - the source root is put on the path first, so that a bare checkout works
from spendfuse.wire import topics  # noqa: E402 - the same
from spendfuse.wire.signing import SIGNATURE_HEADER  # noqa: E402 - the same

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
CONTRACT_VERSION: Final = "1.0.0"
KAFKA_BINDING: Final = "0.5.0"

RFC3339_PATTERN: Final = (
    r"^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])[Tt]([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]"
    r"(\.[0-9]+)?([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$"
)
"""RFC 3339, section 5.6, with the offset required and no leap second: `format` alone asserts nothing."""

MODELS: Final[dict[str, type[wire.WireModel]]] = {
    "usage": wire.Usage,
    "usage-pack": wire.UsagePack,
    "correction": wire.Correction,
    "packed": wire.Packed,
    "packed-corrections": wire.PackedCorrections,
    "budget": wire.Budget,
    "workspace-settings": wire.WorkspaceSettings,
    "price-override": wire.PriceOverride,
    "price-book": wire.PriceBookFile,
    "command": wire.Command,
    "alert": wire.Alert,
    "remaining": wire.Remaining,
    "heartbeat": wire.Heartbeat,
    "ack": wire.Ack,
    "ledger-batch": wire.LedgerBatch,
}

# Rules between fields that a model checks in code, said in JSON Schema where its language can say them.
RULES: Final[dict[str, list[dict[str, Any]]]] = {
    "Usage": [
        {
            "$comment": "a finished call (the default kind) has no deadline",
            "if": {"properties": {"kind": {"const": "finished"}}},
            "then": {"properties": {"deadline": {"type": "null"}}},
        }
    ],
    "WindowSpec": [
        {
            "$comment": "rolling_s goes with kind rolling, and only with it",
            "if": {"properties": {"kind": {"const": "rolling"}}},
            "then": {"properties": {"rolling_s": {"type": "integer"}}, "required": ["rolling_s"]},
            "else": {"properties": {"rolling_s": {"type": "null"}}},
        }
    ],
    "Budget": [
        {
            "$comment": "window run needs a scope run:...",
            "if": {"properties": {"scope": {"not": {"pattern": "^run:"}}}},
            "then": {
                "properties": {
                    "caps": {
                        "items": {"properties": {"window": {"properties": {"kind": {"not": {"const": "run"}}}}}},
                    }
                }
            },
        }
    ],
}


class Channel(NamedTuple):
    """What one topic carries, and what the worker does with it."""

    topic: topics.Topic
    messages: tuple[str, ...]
    actions: tuple[str, ...]
    others: str
    """Who stands at the other end, for the summary of an operation."""


CHANNELS: Final[dict[str, Channel]] = {
    "usage": Channel(topics.USAGE, ("usage", "usage-pack", "correction"), ("receive",), "any emitter sends"),
    "usagePacked": Channel(
        topics.PACKED, ("packed", "packed-corrections"), ("send", "receive"), "the intake sends, the meter receives"
    ),
    "usageDeadLetters": Channel(topics.DEAD_LETTERS, ("dead-letter",), ("send",), "an operator reads"),
    "budgets": Channel(
        topics.BUDGETS, ("budget", "workspace-settings"), ("receive",), "`spendfuse budget apply` sends"
    ),
    "prices": Channel(topics.PRICES, ("price-override",), ("receive",), "`spendfuse prices` sends"),
    "commands": Channel(topics.COMMANDS, ("command",), ("send", "receive"), "every guard receives"),
    "remaining": Channel(topics.REMAINING, ("remaining",), ("send",), "every guard receives"),
    "heartbeats": Channel(topics.HEARTBEATS, ("heartbeat",), ("send",), "every guard receives"),
    "acks": Channel(topics.ACKS, ("ack",), ("receive",), "every guard sends"),
    "alerts": Channel(topics.ALERTS, ("alert",), ("send",), "notifiers receive"),
    "rollups": Channel(topics.ROLLUPS, ("internal",), ("send", "receive"), "the meter sends, the rollup receives"),
    "ledger": Channel(topics.LEDGER, ("ledger-batch",), ("send", "receive"), "the audit receives"),
    "batches": Channel(topics.BATCHES, ("internal",), ("send", "receive"), "the audit sends and reads again"),
    "checkpoints": Channel(topics.CHECKPOINTS, ("internal",), ("send",), "auditors receive; a C2SP signed note"),
}

CLOUDEVENTS_HEADERS: Final[dict[str, Any]] = {
    "type": "object",
    "description": "CloudEvents 1.0, Kafka binary mode: optional on input, always set on output",
    "properties": {
        "ce_specversion": {"type": "string", "const": "1.0"},
        "ce_type": {"type": "string", "description": "dev.spendfuse.<message>.v1"},
        "ce_source": {"type": "string", "format": "uri-reference"},
        "ce_id": {"type": "string"},
        "ce_time": {"type": "string", "format": "date-time"},
        "content-type": {"type": "string", "const": "application/json"},
    },
}
SIGNED: Final = frozenset({"command", "correction", "remaining", "heartbeat", "ack"})
SIGNED_HEADERS: Final[dict[str, Any]] = {
    **CLOUDEVENTS_HEADERS,
    "properties": {
        **CLOUDEVENTS_HEADERS["properties"],
        SIGNATURE_HEADER: {
            "type": "string",
            "pattern": "^ed25519;kid=[A-Za-z0-9][A-Za-z0-9._+-]{0,63};[A-Za-z0-9+/]{86}==$",
            "description": "Ed25519 over `spendfuse-sig-v1\\n` + topic + `\\n` + key + `\\n` + value, in base64",
        },
    },
}
PLAIN_MESSAGES: Final[dict[str, dict[str, Any]]] = {
    "dead-letter": {
        "name": "dead-letter",
        "title": "DeadLetter",
        "summary": "The bytes that were refused, as they came; reason and origin are in the headers.",
        "contentType": "application/octet-stream",
    },
    "internal": {
        "name": "internal",
        "title": "Internal",
        "summary": "Between parts of spendfuse itself: not a contract, it may change with any version.",
        "contentType": "application/octet-stream",
    },
}


def schema_name(name: str) -> str:
    """Return the file name of a message's JSON Schema."""
    return f"{name}.v1.schema.json"


def json_schema(name: str) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of one message."""
    model = MODELS[name]
    schema = model.model_json_schema(mode="validation")
    title = schema.pop("title")
    parts = {title: schema, **schema.get("$defs", {})}
    for part_name, part in parts.items():
        if part_name in RULES:
            part["allOf"] = RULES[part_name]
    _tidy(schema)
    return {"$schema": DIALECT, "$id": f"urn:spendfuse:schema:{name}.v1", "title": title, **schema}


def _tidy(node: Any) -> None:
    """Drop the titles pydantic makes of field names; make an instant's offset and a map's key names rules."""
    if isinstance(node, list):
        for item in node:
            _tidy(item)
    if not isinstance(node, dict):
        return
    for field in node.get("properties", {}).values():
        if isinstance(field, dict):
            field.pop("title", None)
    if node.get("format") == "date-time":
        node["pattern"] = RFC3339_PATTERN
    if "patternProperties" in node:
        node["additionalProperties"] = False
    for value in node.values():
        _tidy(value)


def _message(name: str, channel: Channel) -> dict[str, Any]:
    key = {"type": "string", "description": channel.topic.key}
    if name in PLAIN_MESSAGES:
        return {**PLAIN_MESSAGES[name]}
    model = MODELS[name]
    return {
        "name": name,
        "title": model.__name__,
        "summary": (model.__doc__ or "").strip().splitlines()[0],
        "contentType": "application/json",
        "headers": SIGNED_HEADERS if name in SIGNED else CLOUDEVENTS_HEADERS,
        "payload": {"$ref": f"./json/{schema_name(name)}"},
        "bindings": {"kafka": {"key": key, "bindingVersion": KAFKA_BINDING}},
    }


def _retention(topic: topics.Topic) -> str:
    if topic.retention_ms == topics.FOREVER:
        return "forever"
    days, rest = divmod(topic.retention_ms, topics.DAY_MS)
    return f"{topic.retention_ms} ms" if rest else f"{days} d"


def _channel(channel: Channel) -> dict[str, Any]:
    topic = channel.topic
    kafka: dict[str, Any] = {
        "topic": topic.name,
        "topicConfiguration": {
            "cleanup.policy": topic.cleanup.split(","),
            "retention.ms": topic.retention_ms,
            "max.message.bytes": topics.MESSAGE_BYTES_MAX,
        },
        "bindingVersion": KAFKA_BINDING,
    }
    if topic.partitions:
        kafka["partitions"] = topic.partitions
    partitions = topic.partitions or "as many as the deployment chose at birth"
    return {
        "address": topic.name,
        "description": f"{topic.what}. Key: {topic.key}. Partitions: {partitions}.",
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in channel.messages},
        "bindings": {"kafka": kafka},
        "x-kafka-topic-settings": topic.configs(),
    }


def asyncapi() -> dict[str, Any]:
    """Return the AsyncAPI 3.0 document, seen from the worker: what an emitter sends, the worker receives."""
    operations = {
        f"{action}{name[0].upper()}{name[1:]}": {
            "action": action,
            "channel": {"$ref": f"#/channels/{name}"},
            "summary": f"{channel.topic.what}; {channel.others}",
            "messages": [{"$ref": f"#/channels/{name}/messages/{message}"} for message in channel.messages],
        }
        for name, channel in CHANNELS.items()
        for action in channel.actions
    }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "spendfuse",
            "version": CONTRACT_VERSION,
            "description": (
                "Usage events in, signed kill-switch commands out. Seen from the worker: an emitter sends what the "
                "worker receives, a guard receives what it sends. Generated by schemas/generate.py."
            ),
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": {name: _channel(channel) for name, channel in CHANNELS.items()},
        "operations": operations,
        "components": {
            "messages": {
                message: _message(message, channel) for channel in CHANNELS.values() for message in channel.messages
            }
        },
    }


def topics_table() -> str:
    """Return the table of topics as Markdown."""
    rows = [
        "# Topics",
        "",
        "Generated by `schemas/generate.py` from `wire/topics.py`. Partitions `n`: the deployment's count, for good.",
        "",
        "| topic | key | partitions | cleanup | retention | what | schema |",
        "|---|---|---|---|---|---|---|",
    ]
    for channel in CHANNELS.values():
        topic = channel.topic
        schemas = ", ".join(
            f"[{name}](json/{schema_name(name)})" if name in MODELS else name for name in channel.messages
        )
        key = topic.key.replace("|", "\\|")
        rows.append(
            f"| `{topic.name}` | {key} | {topic.partitions or 'n'} | {topic.cleanup} | {_retention(topic)} "
            f"| {topic.what} | {schemas} |"
        )
    return "\n".join(rows) + "\n"


class _Plain(yaml.SafeDumper):
    """YAML without anchors: the document is for people and for parsers that know none."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write shared parts out."""
        del data
        return True


def documents() -> dict[Path, str]:
    """Return every generated file and its text."""
    files = {
        HERE / "json" / schema_name(name): json.dumps(json_schema(name), indent=2, ensure_ascii=False) + "\n"
        for name in MODELS
    }
    # S506: the Dumper is a SafeDumper that writes no anchors.
    text = yaml.dump(asyncapi(), Dumper=_Plain, sort_keys=False, width=110, allow_unicode=True)
    files[HERE / "asyncapi.yaml"] = "# Generated by schemas/generate.py: change the models instead.\n" + text
    files[HERE / "topics.md"] = topics_table()
    return files


def differences() -> list[str]:
    """Return a unified diff of each generated file that is not current, and a line for each one too many."""
    expected = documents()
    found: list[str] = []
    for path, text in expected.items():
        present = path.read_text(encoding="utf-8") if path.exists() else ""
        if present != text:
            name = str(path.relative_to(HERE.parent))
            diff = difflib.unified_diff(
                present.splitlines(), text.splitlines(), name, f"{name} (generated)", lineterm=""
            )
            found.append("\n".join(diff))
    found += [
        f"{path.relative_to(HERE.parent)}: no model writes this file; remove it"
        for path in sorted((HERE / "json").glob("*"))
        if path not in expected
    ]
    return found


def main() -> int:
    """Write the files, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 when a file is not current")
    if parser.parse_args().check:
        found = differences()
        if found:
            print("\n".join(found))
            print("\nThe contract differs from the models: run `python schemas/generate.py` and commit what it writes.")
        return 1 if found else 0
    for path, text in documents().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(HERE.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
