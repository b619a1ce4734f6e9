"""A provider's response -> its tokens, the model that answered, and its id.

Anthropic counts input exclusive of cache; OpenAI and Gemini count it inclusive, and are converted here: getting
this wrong is worth up to ten times the money. A counter that would be negative is 0.
Of a stream, give the last event with usage, never a sum (Gemini repeats cumulative counts in every event).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from spendfuse.wire.base import TOKENS_MAX
from spendfuse.wire.usage import Tokens


class Extracted(NamedTuple):
    """What a response says of itself; `model` and `id` are empty when it does not say."""

    tokens: Tokens
    model: str
    id: str


def from_anthropic(response: Any) -> Extracted:
    """Return the usage of an Anthropic Messages response (input is exclusive of cache).

    Writes without a split by lifetime are 5-minute writes, the API's default. The `iterations[]` of a compaction or
    an advisor are not read.
    """
    usage = _usage(response, "usage")
    written = _count(usage, "cache_creation_input_tokens")
    split = _get(usage, "cache_creation")
    written_1h = _count(split, "ephemeral_1h_input_tokens")
    written_5m = _count(split, "ephemeral_5m_input_tokens")
    output = _count(usage, "output_tokens")
    return _extracted(
        response,
        Tokens(
            input=_count(usage, "input_tokens"),
            cache_read=_count(usage, "cache_read_input_tokens"),
            cache_write_5m=max(written_5m, written - written_1h),
            cache_write_1h=written_1h,
            output=output,
            reasoning=min(output, _count(_get(usage, "output_tokens_details"), "thinking_tokens")),
        ),
    )


def from_openai_chat(response: Any) -> Extracted:
    """Return the usage of an OpenAI Chat Completions response or last stream chunk (input is inclusive of cache).

    A stream has usage only with `stream_options={"include_usage": true}`.
    """
    return _from_openai(response, "prompt_tokens", "completion_tokens")


def from_openai_responses(response: Any) -> Extracted:
    """Return the usage of an OpenAI Responses response, or of `response.completed` (input is inclusive of cache)."""
    inner = _get(response, "response")
    return _from_openai(response if inner is None else inner, "input_tokens", "output_tokens")


def _from_openai(response: Any, input_name: str, output_name: str) -> Extracted:
    usage = _usage(response, "usage")
    details = _get(usage, f"{input_name}_details")
    cached = _count(details, "cached_tokens")
    written = _count(details, "cache_write_tokens")
    output = _count(usage, output_name)
    return _extracted(
        response,
        Tokens(
            input=max(0, _count(usage, input_name) - cached - written),
            cache_read=cached,
            cache_write_5m=written,
            output=output,
            reasoning=min(output, _count(_get(usage, f"{output_name}_details"), "reasoning_tokens")),
        ),
    )


def from_gemini(response: Any) -> Extracted:
    """Return the usage of a Gemini response, REST (camelCase) or `google-genai` (snake_case).

    The prompt is inclusive of cache; tool-use prompts are input, and thoughts are output, each beside the count.
    """
    usage = _usage(response, "usage_metadata", "usageMetadata")
    cached = _count(usage, "cached_content_token_count", "cachedContentTokenCount")
    prompt = _count(usage, "prompt_token_count", "promptTokenCount")
    tools = _count(usage, "tool_use_prompt_token_count", "toolUsePromptTokenCount")
    thoughts = _count(usage, "thoughts_token_count", "thoughtsTokenCount")
    answer = _count(usage, "candidates_token_count", "candidatesTokenCount")
    live = _count(usage, "response_token_count", "responseTokenCount")
    return _extracted(
        response,
        Tokens(
            input=max(0, prompt + tools - cached),
            cache_read=cached,
            output=(answer or live) + thoughts,
            reasoning=thoughts,
        ),
    )


def _extracted(response: Any, tokens: Tokens) -> Extracted:
    model = _get(response, "model", "model_version", "modelVersion")
    found = _get(response, "id", "response_id", "responseId")
    return Extracted(tokens, model if isinstance(model, str) else "", found if isinstance(found, str) else "")


def _usage(response: Any, *names: str) -> Any:
    usage = _get(response, *names)
    if usage is None:
        raise ValueError(
            f"the response has no {names[0]}: give the whole response, or the last event of its stream "
            "(OpenAI sends it only with stream_options include_usage)"
        )
    return usage


def _get(thing: Any, *names: str) -> Any:
    """Return the first of a mapping's items or an object's attributes that is there and not None."""
    for name in names:
        found = thing.get(name) if isinstance(thing, Mapping) else getattr(thing, name, None)
        if found is not None:
            return found
    return None


def _count(thing: Any, *names: str) -> int:
    found = _get(thing, *names)
    if found is None:
        return 0
    if isinstance(found, bool) or not isinstance(found, int):
        raise ValueError(f"{names[0]} is {found!r}: not a count of tokens")  # noqa: TRY004 - a usage at fault is a ValueError everywhere
    if found > TOKENS_MAX:
        raise ValueError(f"{names[0]} is {found:,}: more than {TOKENS_MAX:,} tokens in one call")
    return max(0, found)
