"""`python -m spendfuse.grafana.generate [--check]`: write the dashboards, or say whether they are as they should be."""

import argparse
import sys
from pathlib import Path
from typing import Final

from spendfuse.grafana.dashboards import DASHBOARDS, text

_PARENTS_TO_ROOT: Final = 3
DIRECTORY: Final = Path("deploy/grafana/dashboards")


def main(arguments: list[str] | None = None) -> int:
    """Write the files under the checkout; with --check write nothing and return 1 for the first that differs."""
    parser = argparse.ArgumentParser(prog="python -m spendfuse.grafana.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not as generated")
    root = Path(__file__).resolve().parents[_PARENTS_TO_ROOT]
    parser.add_argument("--root", type=Path, default=root, help="the checkout")
    given = parser.parse_args(arguments)
    stale = [name for name in DASHBOARDS if not _is_current(given.root, name)]
    if given.check:
        for name in stale:
            sys.stderr.write(f"{DIRECTORY / name}.json is not what its source says: run make generate\n")
        return int(bool(stale))
    for name in stale:
        path = _path(given.root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(name), encoding="utf-8")
        sys.stdout.write(f"wrote {DIRECTORY / name}.json\n")
    return 0


def _path(root: Path, name: str) -> Path:
    return root / DIRECTORY / f"{name}.json"


def _is_current(root: Path, name: str) -> bool:
    path = _path(root, name)
    return path.is_file() and path.read_text(encoding="utf-8") == text(name)


if __name__ == "__main__":
    sys.exit(main())
