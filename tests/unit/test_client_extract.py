"""Real shapes of four providers' responses, and the disjoint counters they must become."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from spendfuse.client import Tokens, from_anthropic, from_gemini, from_openai_chat, from_openai_responses

if TYPE_CHECKING:
    from collections.abc import Callable

    from spendfuse.client import Extracted

ANTHROPIC = {
    "id": "msg_01",
    "type": "message",
    "model": "claude-sonnet-4-6",
    "usage": {
        "input_tokens": 200,
        "cache_read_input_tokens": 100_000,
        "cache_creation_input_tokens": 5_000,
        "cache_creation": {"ephemeral_5m_input_tokens": 2_000, "ephemeral_1h_input_tokens": 3_000},
        "output_tokens": 900,
        "output_tokens_details": {"thinking_tokens": 400},
        "service_tier": "standard",
    },
}
OPENAI_CHAT = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "model": "gpt-5-2025-08-07",
    "usage": {
        "prompt_tokens": 10_000,
        "completion_tokens": 700,
        "total_tokens": 10_700,
        "prompt_tokens_details": {"cached_tokens": 7_000, "audio_tokens": 0, "cache_write_tokens": 1_000},
        "completion_tokens_details": {"reasoning_tokens": 512},
    },
}
OPENAI_RESPONSES = {
    "id": "resp_1",
    "object": "response",
    "model": "gpt-5-2025-08-07",
    "usage": {
        "input_tokens": 10_000,
        "input_tokens_details": {"cached_tokens": 7_000, "cache_write_tokens": 1_000},
        "output_tokens": 700,
        "output_tokens_details": {"reasoning_tokens": 512},
        "total_tokens": 10_700,
    },
}
GEMINI = {
    "responseId": "g-1",
    "modelVersion": "gemini-3-pro",
    "usageMetadata": {
        "promptTokenCount": 5_000,
        "cachedContentTokenCount": 4_000,
        "toolUsePromptTokenCount": 300,
        "candidatesTokenCount": 250,
        "thoughtsTokenCount": 150,
        "totalTokenCount": 5_700,
    },
}
OF_OPENAI = Tokens(input=2_000, cache_read=7_000, cache_write_5m=1_000, output=700, reasoning=512)
GOLDEN = [
    pytest.param(
        from_anthropic,
        ANTHROPIC,
        Tokens(input=200, cache_read=100_000, cache_write_5m=2_000, cache_write_1h=3_000, output=900, reasoning=400),
        ("claude-sonnet-4-6", "msg_01"),
        id="anthropic messages, input exclusive of cache",
    ),
    pytest.param(
        from_openai_chat,
        OPENAI_CHAT,
        OF_OPENAI,
        ("gpt-5-2025-08-07", "chatcmpl-1"),
        id="openai chat, input inclusive of cache",
    ),
    pytest.param(
        from_openai_responses,
        OPENAI_RESPONSES,
        OF_OPENAI,
        ("gpt-5-2025-08-07", "resp_1"),
        id="openai responses, input inclusive of cache",
    ),
    pytest.param(
        from_openai_responses,
        {"type": "response.completed", "response": OPENAI_RESPONSES},
        OF_OPENAI,
        ("gpt-5-2025-08-07", "resp_1"),
        id="openai responses, the last event of a stream",
    ),
    pytest.param(
        from_gemini,
        GEMINI,
        Tokens(input=1_300, cache_read=4_000, output=400, reasoning=150),
        ("gemini-3-pro", "g-1"),
        id="gemini, prompt inclusive of cache, thoughts beside candidates",
    ),
]


def as_object(value: Any) -> Any:
    """Return mappings as objects with attributes, as the providers' own SDKs give them."""
    if isinstance(value, dict):
        return SimpleNamespace(**{key: as_object(item) for key, item in value.items()})
    return value


def snake_case(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            "".join(f"_{c.lower()}" if c.isupper() else c for c in key): snake_case(item) for key, item in value.items()
        }
    return value


@pytest.mark.parametrize(("extract", "response", "tokens", "names"), GOLDEN)
def test_a_response_becomes_disjoint_counters(
    extract: Callable[[Any], Extracted], response: dict[str, Any], tokens: Tokens, names: tuple[str, str]
) -> None:
    for form in (response, as_object(response)):
        extracted = extract(form)
        assert extracted.tokens == tokens
        assert (extracted.model, extracted.id) == names


def test_the_providers_own_totals_agree() -> None:
    assert from_openai_chat(OPENAI_CHAT).tokens.total == OPENAI_CHAT["usage"]["total_tokens"]  # type: ignore[index]
    assert from_gemini(GEMINI).tokens.total == GEMINI["usageMetadata"]["totalTokenCount"]  # type: ignore[index]


def test_gemini_in_snake_case_is_the_same() -> None:
    assert from_gemini(as_object(snake_case(GEMINI))) == from_gemini(GEMINI)


def test_anthropic_writes_without_a_split_are_five_minute_writes() -> None:
    usage = {"input_tokens": 1, "cache_creation_input_tokens": 800, "cache_creation": None, "output_tokens": 2}
    assert from_anthropic({"usage": usage}).tokens == Tokens(input=1, cache_write_5m=800, output=2)


def test_anthropic_writes_beyond_their_split_are_five_minute_writes() -> None:
    usage = {
        "cache_creation_input_tokens": 800,
        "cache_creation": {"ephemeral_1h_input_tokens": 500, "ephemeral_5m_input_tokens": 100},
    }
    assert from_anthropic({"usage": usage}).tokens == Tokens(cache_write_5m=300, cache_write_1h=500)


@pytest.mark.parametrize(
    ("extract", "usage"),
    [
        (from_openai_chat, {"usage": {"prompt_tokens": 10, "prompt_tokens_details": {"cached_tokens": 50}}}),
        (from_openai_responses, {"usage": {"input_tokens": 10, "input_tokens_details": {"cached_tokens": 50}}}),
        (from_gemini, {"usageMetadata": {"promptTokenCount": 10, "cachedContentTokenCount": 50}}),
    ],
)
def test_a_counter_that_would_be_negative_is_zero(extract: Callable[[Any], Extracted], usage: dict[str, Any]) -> None:
    assert extract(usage).tokens == Tokens(input=0, cache_read=50)


def test_reasoning_is_never_more_than_output() -> None:
    usage = {"output_tokens": 5, "output_tokens_details": {"reasoning_tokens": 9}}
    assert from_openai_responses({"usage": usage}).tokens == Tokens(output=5, reasoning=5)


@pytest.mark.parametrize("extract", [from_anthropic, from_openai_chat, from_openai_responses, from_gemini])
@pytest.mark.parametrize("response", [{}, {"usage": None}, None, "text", object()])
def test_a_response_without_usage_is_an_error_never_a_free_call(
    extract: Callable[[Any], Extracted], response: object
) -> None:
    with pytest.raises(ValueError, match="has no usage"):
        extract(response)


@pytest.mark.parametrize("count", ["12", 1.5, True, 10**10])
def test_a_counter_that_is_no_count_is_an_error(count: object) -> None:
    with pytest.raises(ValueError, match="input_tokens"):
        from_anthropic({"usage": {"input_tokens": count}})
