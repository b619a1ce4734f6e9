"""What an agent imports: a Meter to say what it used, a Guard to be stopped by.

The settings come from `SPENDFUSE_...` (workspace, team, agent, bootstrap servers, public keys), or as arguments:

>>> from spendfuse.client import Meter, Tokens, from_anthropic
>>> meter = Meter.from_env(workspace="acme", team="research", agent="planner-7")
>>> response = {"id": "msg_1", "model": "claude-sonnet-4-6", "usage": {"input_tokens": 200, "output_tokens": 100}}
>>> used = from_anthropic(response)
>>> used.tokens
Tokens(input=200, cache_read=0, cache_write_5m=0, cache_write_1h=0, output=100, reasoning=0)
>>> usage = meter.record(provider="anthropic", model=used.model, tokens=used.tokens, id=f"anthropic:{used.id}")
>>> usage.id, usage.agent_path
('anthropic:msg_1', 'acme/research/planner-7')
>>> meter.close(timeout_s=0)  # False: no broker was there to take it, and a warning said so
False

And before each call: `guard = Guard.from_env()` once, then `guard.check()`, which raises `Halted`; or
`guard.call(...)`, which also announces the call, refuses one that does not fit, and settles it (see `calls`).
"""

from spendfuse.client.calls import Call
from spendfuse.client.extract import Extracted, from_anthropic, from_gemini, from_openai_chat, from_openai_responses
from spendfuse.client.guard import Guard, Left
from spendfuse.client.halted import Halted, NoRoom
from spendfuse.client.meter import Meter, MeterStats
from spendfuse.client.silence import GuardState
from spendfuse.wire.usage import Tokens, Usage

__all__ = [
    "Call",
    "Extracted",
    "Guard",
    "GuardState",
    "Halted",
    "Left",
    "Meter",
    "MeterStats",
    "NoRoom",
    "Tokens",
    "Usage",
    "from_anthropic",
    "from_gemini",
    "from_openai_chat",
    "from_openai_responses",
]
