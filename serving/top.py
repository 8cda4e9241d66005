"""``fathom top``: what a server does at present, from its metrics."""

import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from math import ceil

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from serving.client import shade
from serving.errors import InvalidArgumentError, UnavailableError
from serving.gateway.stats import ReplicaStats, Stats, Times, read

TIMEOUT_S = 10.0
BLOCKS = " ▁▂▃▄▅▆▇█"
METER = 6  # characters
PIPE_WIDTH = 120  # characters, where the output is no terminal

Scrape = Callable[[], Stats]


def scraper(target: str) -> Scrape:
    """Reads the metrics of a server at host:port, or at an URL. Raises UnavailableError."""
    url = target if "://" in target else f"http://{target}"

    def scrape() -> Stats:
        try:
            with urllib.request.urlopen(f"{url.rstrip('/')}/metrics", timeout=TIMEOUT_S) as answer:
                return read(answer.read().decode())
        except (urllib.error.URLError, OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise UnavailableError(f"no metrics at {url}/metrics: {reason}") from None

    return scrape


def show(scrape: Scrape, interval_s: float, once: bool, console: Console | None = None) -> None:
    """Frames until interrupted, or one. Raises InvalidArgumentError or UnavailableError."""
    if not 0 < interval_s <= 3600:
        raise InvalidArgumentError("--interval", interval_s, "must be above 0, at most 3600")
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, PIPE_WIDTH)
    frames = _frames(scrape, interval_s)
    if once:
        console.print(next(frames))
        return
    with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        for shown in frames:
            live.update(shown, refresh=True)


def _frames(scrape: Scrape, interval_s: float) -> Iterator[RenderableType]:
    then = scrape()
    while True:
        time.sleep(interval_s)
        now = scrape()
        yield frame(now, then)
        then = now


def frame(now: Stats, then: Stats) -> RenderableType:
    """What has happened from one reading to the next."""
    seconds = max(now.at - then.at, 1e-9)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("model", no_wrap=True)
    for name in ("slots", "queue", "tok/s", "req/s", "first ms", "next ms"):
        table.add_column(name, justify="left" if name == "slots" else "right", no_wrap=True)
    table.add_column("depth", no_wrap=True)
    for name, model in sorted(now.models.items()):
        before = then.models.get(name)
        table.add_row(Text(name, style="bold"), *_cells(model, before or model, seconds))
        if len(model.replicas) > 1:
            for replica, stats in sorted(model.replicas.items()):
                old = before.replicas.get(replica) if before is not None else None
                table.add_row(Text(f"  {replica}", style="dim"), *_cells(stats, old or stats, seconds))
    replicas = sum(len(model.replicas) for model in now.models.values())
    heading = f"{len(now.models)} models, {replicas} replicas; the last {seconds:.3g} s; times: p50 / p99"
    return Group(Text(heading, style="dim"), table)


def _cells(now: ReplicaStats, then: ReplicaStats, seconds: float) -> list[Text]:
    generated = max(0.0, now.generated - then.generated) / seconds
    ended = max(0.0, sum(now.ended.values()) - sum(then.ended.values())) / seconds
    return [
        _meter(now.running, now.slots),
        Text(f"{now.waiting:.0f}", style="red" if now.waiting else "dim"),
        Text(f"{generated:,.0f}"),
        Text(f"{ended:,.1f}"),
        _times(now.first_token.since(then.first_token)),
        _times(now.between_tokens.since(then.between_tokens)),
        _depths(_more(now.by_depth, then.by_depth), max(map(int, now.by_depth), default=1)),
    ]


def _meter(running: float, slots: float) -> Text:
    share = running / slots if slots else 0.0
    full = min(METER, round(share * METER + 0.49)) if running else 0
    colour = "green" if share < 0.8 else "yellow" if share < 1 else "red"
    return Text.assemble(
        ("━" * full, colour), ("━" * (METER - full), "bright_black"), f" {running:.0f}/{slots:.0f}"
    )


def _times(times: Times) -> Text:
    middle, late = times.quantile(0.5), times.quantile(0.99)
    if middle is None or late is None:
        return Text("-", style="dim")
    return Text(f"{_ms(middle)} / {_ms(late)}")


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f}" if seconds < 0.01 else f"{seconds * 1000:,.0f}"


def _more(now: dict[str, float], then: dict[str, float]) -> dict[int, float]:
    return {
        int(depth): count - then.get(depth, 0) for depth, count in now.items() if count > then.get(depth, 0)
    }


def _depths(counts: dict[int, float], deepest: int) -> Text:
    """A bar for each depth from 1 to the deepest of these tokens, and the mean; coloured by the deepest ever seen."""
    total = sum(counts.values())
    if not total:
        return Text("-", style="dim")
    most = max(counts.values())
    text = Text()
    for depth in range(1, max(counts) + 1):
        block = BLOCKS[ceil(8 * counts.get(depth, 0) / most)]
        text.append(block, style=f"color({shade(depth, deepest)})")
    mean = sum(depth * count for depth, count in counts.items()) / total
    text.append(f" {mean:.2f}")
    return text
