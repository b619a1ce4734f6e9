"""`spendfuse demo`: the weekend, or a trace, on this machine."""

from pathlib import Path
from typing import Annotated, Final

import typer

from spendfuse.cli.options import Json, command

FAST_SPAN_S: Final = 20
SPAN_S_MAX: Final = 3_600


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(
        app,
        demo,
        "spendfuse demo",
        "spendfuse demo --fast --json",
        "spendfuse demo --trace AzureLLMInferenceTrace_code.csv --preset azure-llm-2023",
    )


def demo(
    fast: Annotated[bool, typer.Option("--fast", help=f"The 72 hours in {FAST_SPAN_S} seconds.")] = False,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Replay a trace of real calls instead of the weekend.")
    ] = None,
    preset: Annotated[str, typer.Option(help="What the trace is: azure-llm-2023, mooncake.")] = "azure-llm-2023",
    directory: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep logs and the trail here; else they are thrown away.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Watch 23 runaway agents being stopped at their caps: everything on this machine, no account, no Docker.

    The incident it is about: 23 subagents left alone over a weekend, $47,000 in 72 hours.
    """
    import tempfile

    from spendfuse.cli import console

    show = not as_json and console.out().is_terminal
    with tempfile.TemporaryDirectory(prefix="spendfuse-demo-") as thrown_away:
        where = directory or Path(thrown_away)
        screen = console.err() if as_json else console.out()
        if trace is not None:
            from spendfuse.adapters.table import preset as mapping_of
            from spendfuse.demo.trace import print_trace_report, run_trace

            mapping = mapping_of(preset)
            replayed = run_trace(screen, directory=where, path=trace, mapping=mapping, show=show)
            if as_json:
                console.data(replayed.as_json())
            else:
                print_trace_report(screen, replayed, synthetic=mapping.synthetic)
            return
        from spendfuse.demo.weekend import SPAN_S_DEFAULT, print_report, run_weekend

        report = run_weekend(screen, directory=where, span_s=FAST_SPAN_S if fast else SPAN_S_DEFAULT, show=show)
        if as_json:
            console.data(report.as_json())
        else:
            print_report(screen, report)
