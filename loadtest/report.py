"""A report in one HTML file, with its plots inside; and the plots as PNG files."""

import json
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from matplotlib import pyplot
from pydantic import ValidationError
from rich.console import Console

from loadtest import plots, search, table
from loadtest.errors import LoadTestError
from loadtest.result import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
pre { background: #f6f6f4; padding: 1rem; overflow-x: auto; font-size: 13px; line-height: 1.35; }
figure { margin: 1.5rem 0; }
svg { max-width: 100%; height: auto; }
.warning { border-left: 4px solid #c0392b; padding-left: .8rem; }
table { border-collapse: collapse; }
td { padding: .1rem 1.2rem .1rem 0; vertical-align: top; }
</style>
<h1>{{ title }}</h1>
<p>{{ subtitle }}</p>
{% for warning in warnings %}
<p class="warning">{{ warning }}</p>
{% endfor %}
<pre>{{ text }}</pre>
{% for name, svg in plots %}
<figure id="{{ name }}">{{ svg | safe }}</figure>
{% endfor %}
{% for title, values in details %}
<h2>{{ title }}</h2>
<table>
{% for name, value in values.items() %}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table>
{% endfor %}
</html>
""")


def write_report(result: Result, html: Path | None, folder: Path | None) -> None:
    drawn = _draw(plots.of_result(result), html is not None, folder)
    if html:
        server = result.config.get("server", {})
        page = _PAGE.render(
            title=f"Load test of {result.model.get('name') or server.get('target', 'a server')}",
            subtitle=f"{server.get('target', '')} by {server.get('transport', '')}, {result.started_at}",
            warnings=[f"The harness was a bottleneck: {reason}" for reason in result.harness.reasons],
            text=_text(lambda console: table.show(result, console)),
            plots=drawn,
            details=[*_details(result.config), ("Model", {k: v for k, v in result.model.items() if v})],
        )
        html.write_text(page)


def write_search_report(found: "search.Found", html: Path | None, folder: Path | None) -> None:
    drawn = _draw(plots.of_search(found), html is not None, folder)
    if html:
        server = found.config.get("server", {})
        page = _PAGE.render(
            title="Highest rate within the objectives",
            subtitle=f"{server.get('target', '')} by {server.get('transport', '')}",
            warnings=[],
            text=_text(lambda console: search.show_search(found, console)),
            plots=drawn,
            details=_details(found.config),
        )
        html.write_text(page)


def write_any_report(file: Path, html: Path | None, folder: Path | None) -> None:
    """Of a file that a run or a search wrote. Raises LoadTestError."""
    try:
        schema = json.loads(file.read_text()).get("schema")
    except (OSError, ValueError, AttributeError) as error:
        raise LoadTestError(f"{file}: cannot be read: {error}") from None
    if schema != search.SCHEMA:
        write_report(Result.read(file), html, folder)
        return
    try:
        found = search.Found.model_validate_json(file.read_text())
    except ValidationError as error:
        raise LoadTestError(f"{file}: is no result of a search: {error.errors()[0]['msg']}") from None
    write_search_report(found, html, folder)


def _draw(
    figures: Iterable[tuple[str, "Figure"]], inline: bool, folder: Path | None
) -> list[tuple[str, str]]:
    """Name and SVG of each plot; PNG files in the folder."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, figure in figures:
        if folder:
            figure.savefig(folder / f"{name}.png", dpi=150)
        if inline:
            buffer = StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
            drawn.append((name, buffer.getvalue().partition("<svg")[2].join(("<svg", ""))))
        pyplot.close(figure)
    return drawn


def _text(show: Any) -> str:
    console = Console(file=StringIO(), width=110, color_system=None)
    show(console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def _details(config: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (name.capitalize(), {f"--{key.replace('_', '-')}": value for key, value in values.items()})
        for name, values in config.items()
    ]
