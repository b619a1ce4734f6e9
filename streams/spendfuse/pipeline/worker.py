"""The worker process: `spendfuse worker`, or `python -m spendfuse.pipeline.worker`."""

import asyncio
import gc
import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import faust
import structlog
from aiokafka.errors import KafkaError

from spendfuse.client.clock import parse_clock
from spendfuse.pipeline.app import create_app
from spendfuse.pipeline.refusal import EXIT_REFUSED, StateMismatchError, check_changelogs
from spendfuse.pipeline.topics import TopicMismatchError, ensure_changelogs, ensure_topics
from spendfuse.pipeline.undelivered import Undelivered
from spendfuse.settings import BrokerSettings, ClockSettings, SettingsError, WorkerSettings

EXIT_USAGE: Final = 64
EXIT_UNAVAILABLE: Final = 69
EXIT_NOT_READY: Final = 70
EXIT_DATA_DIR: Final = 73
GC_THRESHOLDS: Final = (100_000, 20, 50)

log: Any = structlog.get_logger("spendfuse.worker")


def configure_logs() -> None:
    """Send structured logs to standard error: JSON, or for a person when it is a terminal."""
    terminal = sys.stderr.isatty()
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: Any = structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                renderer,
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("spendfuse").setLevel(logging.INFO)


def run(broker: BrokerSettings, settings: WorkerSettings, clocks: ClockSettings) -> int:
    """Run a worker until it is told to stop; return its exit code."""
    configure_logs()
    watchdog = _watch_readiness(settings.ready_timeout_s)
    try:
        Path(settings.data_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        advice = "make room there, or set SPENDFUSE_DATA_DIR"
        log.error("no data directory", path=settings.data_dir, reason=str(error), advice=advice)  # noqa: TRY400 - a sentence
        return EXIT_DATA_DIR
    undelivered = Undelivered()
    try:
        asyncio.run(ensure_topics(broker, partitions=settings.partitions, replication=settings.replication))
        asyncio.run(check_changelogs(broker, settings.app_id, settings.partitions))
        asyncio.run(
            ensure_changelogs(broker, settings.app_id, partitions=settings.partitions, replication=settings.replication)
        )
        app = create_app(
            broker, settings, clocks, on_ready=_on_ready(watchdog), refuse=_refuse(settings), on_frozen=_frozen,
            on_undelivered=undelivered.note,
        )  # fmt: skip
    except StateMismatchError as error:
        log.critical("refused to run", reason=str(error))
        return EXIT_REFUSED
    except (SettingsError, TopicMismatchError) as error:
        log.error("cannot start", reason=str(error))  # noqa: TRY400 - the sentence is the message, not a traceback
        return EXIT_USAGE
    except (KafkaError, OSError) as error:
        log.error("broker away", servers=broker.bootstrap_servers, reason=str(error))  # noqa: TRY400 - the same
        return EXIT_UNAVAILABLE
    _spare_the_collector()
    return _execute(_Worker(app, loglevel="WARN", redirect_stdouts=False, quiet=True), undelivered, broker, clocks)


def _execute(worker: Any, undelivered: Undelivered, broker: BrokerSettings, clocks: ClockSettings) -> int:
    """Run a worker until it ends; say why it did."""
    try:
        worker.execute_from_commandline()
    except SystemExit as stopped:
        if stopped.code and undelivered.sentence:
            asyncio.run(undelivered.tell(broker, parse_clock(clocks.clock)()))
            log.critical("worker ended", reason=undelivered.sentence)
            return EXIT_UNAVAILABLE
        if stopped.code:  # mode turns what went wrong into an exit code, and says nothing
            log.critical("worker ended", exit_code=stopped.code, exc_info=stopped.__context__)
        return int(stopped.code or 0)
    return 0


def _refuse(settings: WorkerSettings) -> Callable[[str], None]:
    """Return what ends the process at once: an orderly end would write and acknowledge what must not be."""

    def refuse(sentence: str) -> None:
        log.critical("refused to run", reason=sentence)
        if settings.ready_file:
            Path(settings.ready_file).unlink(missing_ok=True)
        os._exit(EXIT_REFUSED)

    return refuse


def _on_ready(watchdog: threading.Timer) -> Callable[[], None]:
    """Return what a worker does that is ready, before it says so."""

    def on_ready() -> None:
        watchdog.cancel()
        _spare_the_collector()  # of tables, budgets and prices as well: they stay

    return on_ready


def _frozen(silent_s: float) -> None:
    """End at once: others own the partitions by now, and what is still to be written here is older than theirs."""
    log.critical("was frozen", silent_s=round(silent_s, 1), advice="start it again: it reads what others wrote")
    os._exit(EXIT_UNAVAILABLE)


def _spare_the_collector() -> None:
    """Let the cyclic collector look less often, and not at what is there: full rounds took half the intake's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


class _Worker(faust.Worker):
    """Faust's worker, without its own logging: it would clear the handlers that are in place."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """Take what Faust's takes."""
        super().__init__(*args, **options)
        self.spinner = None  # it writes to standard output, terminal or not

    def _setup_logging(self) -> None:
        """Leave the logging as it is."""


def _watch_readiness(timeout_s: float) -> threading.Timer:
    """End the process if it is not ready in time: Faust swallows what goes wrong in a recovery, and would hang."""

    def give_up() -> None:
        log.critical("not ready", timeout_s=timeout_s, advice="read the warnings above; the tables did not recover")
        os._exit(EXIT_NOT_READY)

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    return timer


def main() -> int:
    """Run a worker with the settings of the environment."""
    configure_logs()
    try:
        return run(BrokerSettings.from_env(), WorkerSettings.from_env(), ClockSettings.from_env())
    except SettingsError as error:
        log.error("cannot start", reason=str(error))  # noqa: TRY400 - the sentence is the message
        return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
