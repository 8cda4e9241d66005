"""Whether the harness itself is the limit: the lag of its event loop, its share of a core, and time without a
core."""

import gc
import sys
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from loadtest.clock import Clock
from loadtest.histogram import Distribution
from loadtest.recorder import Floats
from loadtest.result import Harness

PERIOD = 0.02  # seconds between two looks at the lag
# Of the main thread: nanoseconds on a core, nanoseconds waiting for one, times switched to.
_SCHEDSTAT = Path("/proc/self/schedstat")

BUSY = 0.85  # share of a core beyond which latencies queue in the harness
STARVED = 0.05  # share of the time without a core
LATE = 0.01  # lag and delay, as a share of the latencies that they are part of
NOTABLE = 0.5e-3  # seconds of lag or delay that no user notices, whatever the latencies


class Monitor:
    def __init__(self, clock: Clock):
        self._clock = clock
        self._lags = array("d")
        self._running = False
        self._began = self._cpu = 0.0
        self._starved: int | None = None
        self._due = 0.0

    def start(self) -> None:
        self._running = True
        self._began, self._cpu, self._starved = self._clock.now(), time.process_time(), _starved()
        self._due = self._began + PERIOD
        self._clock.at(self._due, self._look)

    def stop(self) -> None:
        self._running = False
        self._wall = max(1e-9, self._clock.now() - self._began)
        self._cpu = time.process_time() - self._cpu
        now = _starved()
        self._starved = None if now is None or self._starved is None else now - self._starved

    def _look(self) -> None:
        now = self._clock.now()
        self._lags.append(now - self._due)
        if self._running:
            self._due = now + PERIOD
            self._clock.at(self._due, self._look)

    def verdict(
        self, delays: Floats, ttft: Floats, offered: float | None, sent: float | None, loop: str
    ) -> Harness:
        """`delays` of the sends and `ttft`, in seconds; the rates that were to be sent and were."""
        lags = np.array(self._lags)
        share = self._cpu / self._wall
        starved = None if self._starved is None else self._starved / 1e9 / self._wall
        allowed = max(NOTABLE, LATE * float(np.median(ttft))) if len(ttft) else NOTABLE
        reasons = []
        if share > BUSY:
            reasons.append(
                f"it used {share:.0%} of a core, over {BUSY:.0%}: its own queueing is in the latencies"
            )
        if starved is not None and starved > STARVED:
            reasons.append(
                f"it waited for a core {starved:.0%} of the time, over {STARVED:.0%}: the machine is busy"
            )
        for what, values in (("its event loop ran", lags), ("it sent requests", delays)):
            if len(values) and (mean := float(values.mean())) > allowed:
                reasons.append(f"{what} {mean * 1e3:.2g} ms late on average, over {allowed * 1e3:.2g} ms")
        if offered and sent and sent < (1 - LATE) * offered:
            reasons.append(f"it sent {sent:.5g} requests/s of the {offered:.5g} offered")
        return Harness(
            cpu_share=share,
            starved_share=starved,
            loop_lag_ms=Distribution.of(lags),
            send_delay_ms=Distribution.of(delays),
            event_loop=loop,
            bottleneck=bool(reasons),
            reasons=reasons,
        )


def _starved() -> int | None:
    """Nanoseconds that this process was ready to run, but no core was free for its main thread."""
    if sys.platform != "linux" or not _SCHEDSTAT.exists():
        return None
    return int(_SCHEDSTAT.read_text().split()[1])


@contextmanager
def quiet_collector() -> Iterator[None]:
    """Keep the garbage collector from stopping the event loop for long: what lives now is not looked at
    again, and the requests themselves leave no cycles."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 1000)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
