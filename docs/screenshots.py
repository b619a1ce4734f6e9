"""Run the demo and draw what it printed: docs/images/*.svg.

python docs/screenshots.py
"""

import tempfile
from pathlib import Path

from rich.console import Console

from spendfuse.demo import weekend

IMAGES = Path(__file__).resolve().parent / "images"


def main() -> None:
    """Draw the wallet as it stood when the last agent was stopped, and the report."""
    console = Console(record=True, width=150, height=44, force_terminal=True, color_system="truecolor")
    with tempfile.TemporaryDirectory(prefix="spendfuse-screenshot-") as directory:
        report = weekend.run_weekend(console, directory=Path(directory), show=True)
    console.save_svg(str(IMAGES / "wallet.svg"), title="spendfuse demo: the live wallet", clear=True)
    weekend.print_report(console, report)
    console.save_svg(str(IMAGES / "report.svg"), title="spendfuse demo: the report")


if __name__ == "__main__":
    main()
