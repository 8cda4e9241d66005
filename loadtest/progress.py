"""A progress bar that costs the event loop some 0.1 ms twice a second."""

import sys
from math import inf
from types import TracebackType
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from loadtest.clock import Clock
from loadtest.driver import Driver, Plan

PERIOD = 0.5  # seconds

tqdm.monitor_interval = 0  # no thread of its own


class Progress:
    """Shows requests finished, or seconds passed where the run ends by the clock. On standard error."""

    def __init__(self, clock: Clock, driver: Driver, plan: Plan, shown: bool = True):
        self._clock = clock
        self._driver = driver
        self._by_time = plan.requests == inf
        total = plan.duration if self._by_time else plan.requests
        form = (
            "{l_bar}{bar}| {n:.0f}/{total:.0f} s{postfix}"
            if self._by_time
            else "{l_bar}{bar}| {n}/{total}{postfix}"
        )
        self._bar: Any = tqdm(
            total=None if total == inf else total,
            disable=not shown,
            file=sys.stderr,
            bar_format=form,
            mininterval=inf,
        )
        self._running = True

    def __enter__(self) -> "Progress":
        self._clock.at(self._clock.now() + PERIOD, self._show)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running = False
        self._refresh()
        self._bar.close()

    def _show(self) -> None:
        if self._running:
            self._refresh()
            self._clock.at(self._clock.now() + PERIOD, self._show)

    def _refresh(self) -> None:
        recorder, seconds = self._driver.recorder, max(1e-9, self._clock.now() - self._driver.origin)
        done = min(seconds, self._bar.total or seconds) if self._by_time else recorder.finished
        self._bar.n = done
        failed = f", {recorder.failed} failed" if recorder.failed else ""
        self._bar.set_postfix_str(
            f"{self._driver.in_flight} under way, {recorder.finished / seconds:.4g} requests/s, "
            f"{recorder.tokens / seconds:.4g} tokens/s{failed}",
            refresh=False,
        )
        self._bar.refresh()
