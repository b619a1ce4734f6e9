"""Each example is judged twice, by the model and by the JSON Schema: who speaks another language sees the same."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend
from pydantic import ValidationError as ModelError

SCHEMAS = Path(__file__).parents[2] / "schemas"
sys.path.insert(0, str(SCHEMAS))

from generate import MODELS, schema_name  # noqa: E402 - a tool beside the schemas, not a package

VALID = sorted((SCHEMAS / "examples" / "valid").glob("*.json"))
INVALID = sorted(path for path in (SCHEMAS / "examples" / "invalid").glob("*.json") if path.name != "reasons.json")
REASONS = json.loads((SCHEMAS / "examples" / "invalid" / "reasons.json").read_text(encoding="utf-8"))

CANNOT_SAY = {
    # Rules that JSON Schema has no words for: arithmetic between fields, uniqueness by a key, calendars, zones, and
    # how a number is written.
    "usage.reasoning-exceeds-output.json",
    "usage.ts-impossible-day.json",
    "usage.input-written-as-float.json",
    "budget.zone-unknown.json",
    "budget.cap-ids-twice.json",
    "correction.nothing.json",
}


def _ecma_pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    # JSON Schema's patterns are ECMA-262, where `$` is the very end; Python's also matches before a last newline.
    del schema
    if validator.is_type(instance, "string") and not re.search(re.sub(r"\$$", r"\\Z", pattern), instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _schema_validator(path: Path) -> Any:
    text = (SCHEMAS / "json" / schema_name(path.name.split(".")[0])).read_text(encoding="utf-8")
    return extend(Draft202012Validator, {"pattern": _ecma_pattern})(json.loads(text))


def _model(path: Path) -> Any:
    return MODELS[path.name.split(".")[0]]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_schema_is_itself_a_valid_schema_with_a_title_and_words_for_each_field(name: str) -> None:
    schema = json.loads((SCHEMAS / "json" / schema_name(name)).read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    assert schema["$id"] == f"urn:spendfuse:schema:{name}.v1"
    assert schema["title"]
    for part in (schema, *schema.get("$defs", {}).values()):
        assert part["additionalProperties"] is False
        silent = [field for field, what in part["properties"].items() if not what.get("description")]
        assert silent == []


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_a_valid_example_passes_the_model_and_the_schema(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    _model(path).model_validate_json(text)
    assert [error.message for error in _schema_validator(path).iter_errors(json.loads(text))] == []


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.stem)
def test_an_invalid_example_fails_at_the_field_that_its_reason_names(path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        _model(path).model_validate_json(path.read_text(encoding="utf-8"))
    fields = {".".join(str(part) for part in fault["loc"] if part != "[key]") for fault in caught.value.errors()}
    assert fields == {REASONS[path.name]["field"]}


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.stem)
def test_an_invalid_example_fails_the_schema_too_but_for_what_schemas_cannot_say(path: Path) -> None:
    faults = list(_schema_validator(path).iter_errors(json.loads(path.read_text(encoding="utf-8"))))
    assert bool(faults) is (path.name not in CANNOT_SAY)


def test_every_invalid_example_has_a_reason_and_every_reason_an_example() -> None:
    assert set(REASONS) == {path.name for path in INVALID}
    assert all(reason["reason"] for reason in REASONS.values())
    assert {name for name, reason in REASONS.items() if "json_schema" in reason} == CANNOT_SAY


def test_every_kind_of_message_that_a_foreign_program_sends_or_obeys_has_examples() -> None:
    assert {path.name.split(".")[0] for path in VALID} >= {"usage", "usage-pack", "correction", "budget", "command"}
    assert len([path for path in INVALID if path.name.startswith("usage.")]) >= 30
