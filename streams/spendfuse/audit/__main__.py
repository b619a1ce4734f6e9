"""`python -m spendfuse.audit`: the audit process, by settings from the environment alone."""

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Final

import structlog

from spendfuse.audit.database import DatabaseUnavailableError
from spendfuse.audit.files import SqlMissingError
from spendfuse.audit.migrate import MigrationError
from spendfuse.audit.service import run
from spendfuse.audit.trail import TrailError
from spendfuse.settings import AuditSettings, BrokerSettings, SettingsError

EXIT_FAILED: Final = 1
EXIT_SETTINGS: Final = 2


def configure_logs() -> None:
    """Write logs to stderr: for people on a terminal, as one JSON object a line anywhere else."""
    last: structlog.types.Processor = (
        structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


async def _until_signalled(audit: AuditSettings, broker: BrokerSettings, ready_file: Path | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await run(audit, broker, stop=stop, ready_file=ready_file)


def main() -> int:
    """Run until SIGTERM or SIGINT; 0 after a clean stop, 1 when it cannot go on, 2 for settings."""
    configure_logs()
    try:
        audit, broker = AuditSettings.from_env(), BrokerSettings.from_env()
        ready_file = os.environ.get("SPENDFUSE_READY_FILE")
        asyncio.run(_until_signalled(audit, broker, Path(ready_file) if ready_file else None))
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_SETTINGS
    except (DatabaseUnavailableError, MigrationError, SqlMissingError, TrailError, OSError) as error:
        structlog.get_logger(__name__).error("the audit cannot go on", error=str(error))
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
