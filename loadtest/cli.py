"""``python -m loadtest``: measure a server. Without a command it makes one run; ``--help`` lists the
flags."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from loadtest.config import Goals, Load, Run, Server, Work
from loadtest.errors import FlagError, LoadTestError
from loadtest.flags import with_flags
from loadtest.loop import run_quick
from loadtest.result import Result

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
INTERRUPTED = 130  # exit code of a program that Ctrl-C ended

Json = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the result.", rich_help_panel="Output")
]
Html = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write a report with plots.", rich_help_panel="Output")
]
Plots = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Write the plots as PNG.", rich_help_panel="Output")
]
Progress = Annotated[bool, typer.Option(help="Show a progress bar.", rich_help_panel="Output")]


@app.callback(invoke_without_command=True)
@with_flags
def run(
    context: typer.Context,
    server: Server,
    load: Load,
    work: Work,
    goals: Goals,
    json: Json = None,
    html: Html = None,
    plots: Plots = None,
    progress: Progress = True,
) -> None:
    """Measure a server: latencies, throughput, failures."""
    from loadtest.run import measure

    _writable(json, html, plots)
    result = run_quick(measure(_with_key(server, load, work, goals), progress))
    _put_out(result, json, html, plots)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)
    if not result.requests.ok:
        raise LoadTestError("no request ended well")


@app.command()
@with_flags
def search(
    server: Server,
    load: Load,
    work: Work,
    goals: Goals,
    attainment: Annotated[
        float, typer.Option(help="Share of the requests that must meet every --slo.")
    ] = 0.99,
    first_rate: Annotated[float, typer.Option(help="Requests per second to begin with.")] = 1.0,
    last_rate: Annotated[float, typer.Option(help="Requests per second not to go beyond.")] = 10_000.0,
    tolerance: Annotated[
        float, typer.Option(help="Stop when the rate is known this well, as a share of it.")
    ] = 0.05,
    json: Json = None,
    html: Html = None,
    plots: Plots = None,
    progress: Progress = True,
) -> None:
    """Find the highest request rate at which the server meets the objectives."""
    from loadtest.search import Search, find_rate, show_search

    _writable(json, html, plots)
    wanted = Search.read(
        {"attainment": attainment, "first_rate": first_rate, "last_rate": last_rate, "tolerance": tolerance}
    )
    found = run_quick(find_rate(_with_key(server, load, work, goals), wanted, progress))
    show_search(found, Console())
    if json:
        json.write_text(found.model_dump_json(by_alias=True, indent=2) + "\n")
    if html or plots:
        from loadtest.report import write_search_report

        write_search_report(found, html, plots)
    if found.interrupted:
        raise typer.Exit(INTERRUPTED)
    if found.rate is None:
        raise LoadTestError(f"--first-rate {first_rate:g}: the objectives are not met even at this rate")


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Result of a run: what was")],
    b: Annotated[Path, typer.Argument(help="Result of a run: what is")],
    max_regression: Annotated[
        float | None,
        typer.Option(min=0, help="Fail where a figure of B is worse by more than this share, such as 0.1."),
    ] = None,
) -> None:
    """Hold two results against each other."""
    from loadtest.compare import differences, show_comparison

    first, second = Result.read(a), Result.read(b)
    rows = differences(first, second)
    show_comparison(rows, first, second, Console())
    worse = [row for row in rows if max_regression is not None and row.regression > max_regression]
    if worse:
        names = ", ".join(f"{row.name} {row.regression:+.1%}" for row in worse)
        raise LoadTestError(f"--max-regression {max_regression:g}: worse than that: {names}")


@app.command()
def report(
    result: Annotated[Path, typer.Argument(help="Result of a run, or of a search")],
    html: Html = None,
    plots: Plots = None,
) -> None:
    """Draw the report of a result again."""
    from loadtest.report import write_any_report

    if not html and not plots:
        raise FlagError("--html", None, "is required, or --plots")
    _writable(None, html, plots)
    write_any_report(result, html, plots)


@app.command()
def calibrate(
    rate: Annotated[float, typer.Option(help="Requests per second.")] = 1000.0,
    duration: Annotated[float, typer.Option(help="Seconds.")] = 5.0,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each request.")] = 8,
    ttft_ms: Annotated[float, typer.Option(help="Delay of the first token.")] = 50.0,
    itl_ms: Annotated[float, typer.Option(help="Delay of each further token.")] = 5.0,
    limit: Annotated[float, typer.Option(help="Largest error of a mean or median, as a share.")] = 0.01,
) -> None:
    """Measure a server whose delays are known, started beside the harness on this machine, and say how far
    off the figures are."""
    from loadtest.calibrate import calibrated, show_calibration

    found = run_quick(calibrated(rate, duration, max_tokens, ttft_ms, itl_ms))
    if not show_calibration(found, limit, Console()):
        raise LoadTestError(f"--limit {limit:g}: a figure is off by more than that on this machine")


def _with_key(server: Server, load: Load, work: Work, goals: Goals) -> Run:
    if server.api_key is None and (key := os.environ.get("FATHOM_API_KEY")):
        server = server.model_copy(update={"api_key": key})
    return Run(server=server, load=load, work=work, goals=goals)


def _writable(json: Path | None, html: Path | None, plots: Path | None) -> None:
    """Fail before the run, rather than after it."""
    for name, file in (("--json", json), ("--html", html)):
        if file and not file.parent.is_dir():
            raise FlagError(name, file, f"there is no folder {file.parent}")
        if file and (file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK)):
            raise FlagError(name, file, "cannot be written")
    if plots and plots.exists() and not plots.is_dir():
        raise FlagError("--plots", plots, "is not a folder")


def _put_out(result: Result, json: Path | None, html: Path | None, plots: Path | None) -> None:
    from loadtest.table import show

    show(result, Console())
    if json:
        result.write(json)
    if html or plots:
        from loadtest.report import write_report

        write_report(result, html, plots)


def main() -> None:
    """Errors go to standard error as one line, with an exit code that is not 0."""
    command: Callable[..., Any] = app
    try:
        command()
    except LoadTestError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
