"""Run the demo and draw what it printed: docs/images/*.svg.

python docs/screenshots.py
"""

import tempfile
from pathlib import Path
from types import TracebackType

from rich.console import Console

from spendfuse.demo import weekend
from spendfuse.demo.live import LiveView

IMAGES = Path(__file__).resolve().parent / "images"
PAPER = Console(record=True, width=132, height=44, force_terminal=True, color_system="truecolor")


class LastPicture(LiveView):
    """A live wallet whose last picture is kept, and not the thousand before it."""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep it."""
        if self._live is not None and kind is None:
            PAPER.print(self._live.get_renderable())
            PAPER.save_svg(str(IMAGES / "wallet.svg"), title="spendfuse demo: the live wallet")
        await super().__aexit__(kind, error, trace)


def main() -> None:
    """Draw the wallet as it stood when the last agent was stopped, and the report."""
    weekend.LiveView = LastPicture  # type: ignore[misc]  # the demo's own view, and one thing more
    screen = Console(width=132, height=44, force_terminal=True)
    with tempfile.TemporaryDirectory(prefix="spendfuse-screenshot-") as directory:
        report = weekend.run_weekend(screen, directory=Path(directory), show=True)
    weekend.print_report(PAPER, report)
    PAPER.save_svg(str(IMAGES / "report.svg"), title="spendfuse demo: the report")


if __name__ == "__main__":
    main()
