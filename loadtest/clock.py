"""Callbacks at absolute times, more exact than the timers of an event loop, which round up to
milliseconds."""

import asyncio
import contextlib
import ctypes
import heapq
import os
import sys
import time
from collections.abc import Callable
from itertools import count
from typing import Any, Protocol

# Of Linux's <sys/timerfd.h>.
_CLOCK_MONOTONIC = 1
_TFD_TIMER_ABSTIME = 1
_TFD_NONBLOCK, _TFD_CLOEXEC = os.O_NONBLOCK, getattr(os, "O_CLOEXEC", 0)


class Clock(Protocol):
    """What keeps time: real below, virtual in the tests."""

    def now(self) -> float:
        """Seconds, from an arbitrary start."""
        ...

    def at(self, when: float, callback: Callable[..., object], *args: Any) -> None:
        """Call back once `when` has come; at once, but not before returning, where it is past."""
        ...

    def soon(self, callback: Callable[..., object], *args: Any) -> None:
        """Call back when what has already arrived has been dealt with."""
        ...


class LoopClock:
    """Time of `time.perf_counter`. On Linux a timerfd wakes the loop; elsewhere the loop's own timer does.

    One wake-up calls everything that is due, so a rate beyond the timer's resolution is delivered in bursts
    rather than late.
    """

    now = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._heap: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._order = count()
        self._armed = float("inf")
        self._timer = _TimerFd() if sys.platform == "linux" else None
        if self._timer:
            self._loop.add_reader(self._timer.fd, self._fire)

    def at(self, when: float, callback: Callable[..., object], *args: Any) -> None:
        heapq.heappush(self._heap, (when, next(self._order), callback, args))
        if when < self._armed:
            self._arm(when)

    def soon(self, callback: Callable[..., object], *args: Any) -> None:
        self._loop.call_soon(callback, *args)

    async def until(self, when: float) -> None:
        woken = self._loop.create_future()
        self.at(when, _wake, woken)
        await woken

    def close(self) -> None:
        """Forget what was to come."""
        self._heap.clear()
        if self._timer:
            self._loop.remove_reader(self._timer.fd)
            self._timer.close()
            self._timer = None

    def _arm(self, when: float) -> None:
        self._armed = when
        if self._timer:
            self._timer.set(when)
        else:
            self._loop.call_later(max(0.0, when - self.now()), self._fire)

    def _fire(self) -> None:
        if self._timer:
            self._timer.clear()
        self._armed = float("inf")
        heap, due = self._heap, []
        now = self.now()
        while heap and heap[0][0] <= now:
            due.append(heapq.heappop(heap))
        if heap:
            self._arm(heap[0][0])
        for _, _, callback, args in due:
            try:
                callback(*args)
            except Exception as error:
                self._loop.call_exception_handler({"message": "a timed callback failed", "exception": error})


def _wake(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


class _TimerFd:
    """Python has this in `os` from 3.13 on."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd: int = self._libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK | _TFD_CLOEXEC)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        # struct itimerspec: interval and value, each in seconds and nanoseconds.
        self._spec = (ctypes.c_long * 4)()

    def set(self, when: float) -> None:
        seconds = int(when)
        self._spec[2] = seconds
        self._spec[3] = max(1, int((when - seconds) * 1e9))  # all zero would disarm it
        if self._libc.timerfd_settime(self.fd, _TFD_TIMER_ABSTIME, self._spec, None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 8)

    def close(self) -> None:
        os.close(self.fd)
