"""The contract in `schemas/` is what the models say, and its references lead somewhere."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from spendfuse.wire.topics import TOPICS

ROOT = Path(__file__).parents[2]
SCHEMAS = ROOT / "schemas"


def _asyncapi() -> dict[str, Any]:
    return yaml.safe_load((SCHEMAS / "asyncapi.yaml").read_text(encoding="utf-8"))


def _references(node: Any) -> list[str]:
    if isinstance(node, dict):
        found = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return found + [reference for value in node.values() for reference in _references(value)]
    if isinstance(node, list):
        return [reference for item in node for reference in _references(item)]
    return []


def test_the_generated_files_are_what_the_models_give_now() -> None:
    done = subprocess.run(
        [sys.executable, "schemas/generate.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_changed_file_is_told_as_a_diff(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.syspath_prepend(str(SCHEMAS))
    import generate

    monkeypatch.setattr(generate, "HERE", tmp_path / "schemas")
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    assert generate.main() == 0
    usage = tmp_path / "schemas" / "json" / "usage.v1.schema.json"
    usage.write_text(usage.read_text(encoding="utf-8").replace("1000000000", "7"), encoding="utf-8")
    (tmp_path / "schemas" / "json" / "old.v1.schema.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    capsys.readouterr()
    assert generate.main() == 1
    said = capsys.readouterr().out
    assert [line[1:].strip() for line in said.splitlines() if line.startswith("-  ")] == ['"maximum": 7,'] * 6
    assert "schemas/json/old.v1.schema.json: no model writes this file" in said
    assert "run `python schemas/generate.py`" in said


def test_asyncapi_has_a_channel_for_each_topic_with_its_kafka_settings() -> None:
    channels = {channel["address"]: channel for channel in _asyncapi()["channels"].values()}
    assert set(channels) == {topic.name for topic in TOPICS}
    for topic in TOPICS:
        kafka = channels[topic.name]["bindings"]["kafka"]
        assert kafka.get("partitions", 0) == topic.partitions
        assert ",".join(kafka["topicConfiguration"]["cleanup.policy"]) == topic.cleanup
        assert kafka["topicConfiguration"]["retention.ms"] == topic.retention_ms
        assert topic.key in channels[topic.name]["description"]


def test_every_reference_of_the_asyncapi_document_leads_somewhere() -> None:
    document = _asyncapi()
    references = _references(document)
    assert len(references) > 40
    for reference in references:
        if reference.startswith("#/"):
            target: Any = document
            for part in reference[2:].split("/"):
                target = target[part]
        else:
            assert (SCHEMAS / reference).is_file(), reference


def test_the_table_of_topics_names_each_topic_once() -> None:
    table = (SCHEMAS / "topics.md").read_text(encoding="utf-8")
    assert [table.count(f"`{topic.name}`") for topic in TOPICS] == [1] * len(TOPICS)
