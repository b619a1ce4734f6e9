"""A LiteLLM proxy in front of a provider of our own, both on 127.0.0.1: what a budget of its costs and lets through.

Mode: one proxy process with a provider budget (`provider_budget_config`), in memory, as its documentation has it.
Budgets of its virtual keys need a Postgres and an engine that it downloads, so they cannot be measured here. It has no
network: its price map is the one that ships, and every proxy variable leads nowhere.
"""

import asyncio
import json
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distributions
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from isolated import environment

from spendfuse.embedded.processes import ChildProcess, free_port

MODEL = "claude-sonnet-4-6"
KEY = "sk-bench"
READY_S = 120.0
ANSWER_S = 60.0


@dataclass(frozen=True, slots=True)
class Served:
    """What the provider was asked for: the truth of what was spent."""

    calls: int
    input_tokens: int
    output_tokens: int


class Proxy:
    """A running proxy; `served` asks the provider behind it."""

    def __init__(self, url: str, pipe: Connection) -> None:
        self.url = url
        self._pipe = pipe

    def served(self) -> Served:
        """Return what was served since the start, and end the provider."""
        self._pipe.send("how much")
        if not self._pipe.poll(ANSWER_S):
            raise SystemExit("the provider does not say what it served")
        return Served(*self._pipe.recv())


def version() -> str:
    """Return the installed version; raises NotInstalledError."""
    packages = next(environment("litellm").parents[1].glob("lib/python*/site-packages"))
    return next(found.version for found in distributions(path=[str(packages)]) if found.name == "litellm")


@contextmanager
def proxy(directory: Path, budget_usd: float, prices: tuple[float, float], call_s: float) -> Iterator[Proxy]:
    """Start a provider whose calls take `call_s`, and a proxy with a budget before it; prices in dollars of a token."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    provider_port, proxy_port = free_port(), free_port()
    provider = multiprocessing.get_context("spawn").Process(
        target=_provide, args=(provider_port, call_s, theirs), daemon=True
    )
    config = directory / "litellm.yaml"  # JSON is YAML
    config.write_text(json.dumps(_config(provider_port, budget_usd, prices)), encoding="utf-8")
    start = "import sys; from litellm import run_server; sys.exit(run_server())"
    argv = [str(environment("litellm")), "-c", start, "--config", str(config), "--host", "127.0.0.1"]
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    env = {
        **{name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")},
        **nowhere,
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
    }
    process = ChildProcess("LiteLLM", [*argv, "--port", str(proxy_port)], log_path=directory / "litellm.log", env=env)
    url = f"http://127.0.0.1:{proxy_port}"
    provider.start()
    try:
        with process:
            process.wait_until(lambda: asyncio.run(_is_up(f"{url}/health/liveliness")), READY_S)
            yield Proxy(url, ours)
    finally:
        provider.kill()
        provider.join()


async def ask(session: aiohttp.ClientSession, url: str, input_tokens: int, output: int, most: int) -> bool:
    """Make one call of `output` tokens and say whether it was let through; any other fault ends the run."""
    body = {
        "model": MODEL,
        "max_tokens": most,
        "messages": [{"role": "user", "content": f"{input_tokens} {output}"}],
    }
    headers = {"Authorization": f"Bearer {KEY}"}
    async with session.post(f"{url}/v1/chat/completions", json=body, headers=headers) as answer:
        text = await answer.text()
        if answer.status != 200 and "budget" not in text.lower():
            raise SystemExit(f"LiteLLM answers {answer.status}: {text[:500]}")
        return answer.status == 200


def _config(provider_port: int, budget_usd: float, prices: tuple[float, float]) -> dict[str, Any]:
    upstream = {
        "model": f"openai/{MODEL}",
        "api_base": f"http://127.0.0.1:{provider_port}/v1",
        "api_key": "none",
        "input_cost_per_token": prices[0],
        "output_cost_per_token": prices[1],
    }
    return {
        "model_list": [{"model_name": MODEL, "litellm_params": upstream}],
        "router_settings": {
            "num_retries": 0,
            "disable_cooldowns": True,
            "provider_budget_config": {"openai": {"budget_limit": budget_usd, "time_period": "1d"}},
        },
        "litellm_settings": {"num_retries": 0},
        "general_settings": {"master_key": KEY},
    }


async def _is_up(url: str) -> bool:
    try:
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            return answer.status == 200
    except (aiohttp.ClientError, OSError):
        return False


def _provide(port: int, call_s: float, pipe: Connection) -> None:
    """Serve OpenAI's chat completions: as many tokens as the message says, after `call_s`."""
    served = [0, 0, 0]

    async def complete(request: web.Request) -> web.Response:
        asked = await request.json()
        fed, made = (int(number) for number in asked["messages"][-1]["content"].split())
        for nth, more in enumerate((1, fed, made)):
            served[nth] += more
        await asyncio.sleep(call_s)
        usage = {"prompt_tokens": fed, "completion_tokens": made, "total_tokens": fed + made}
        message = {"role": "assistant", "content": "done"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        head = {"id": f"chatcmpl-{served[0]}", "object": "chat.completion", "created": 0, "model": MODEL}
        return web.json_response({**head, "choices": [choice], "usage": usage})

    async def serve() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", complete)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await asyncio.to_thread(pipe.recv)
        pipe.send(served)

    asyncio.run(serve())
