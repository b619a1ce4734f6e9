"""The live wallet while a demo runs."""

from typing import Any, Self


class LiveView:
    def __init__(self, console: Any, stack: Any, clock: Any, start_us: int, span_us: int, *, show: bool) -> None:
        self.clock = clock
        self.s = start_us
        self.n = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None: ...
    def refresh(self, done: int) -> None:
        self.n += 1
        if self.n % 5 == 0:
            print(round((self.clock() - self.s) / 3.6e9, 1), done)
