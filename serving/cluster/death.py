"""The death of a process, noticed before its sockets close.

The kernel first takes down a killed process's memory, tenths of a second for an engine on a busy machine, and only then
closes what it had open. That it is on its way out shows at once in /proc, to processes under the same kernel and in
the same namespace of process ids. Others have to wait for the end of the stream.
"""

import asyncio
import os
from pathlib import Path
from weakref import WeakKeyDictionary

LOOK_S = 0.01
EXITING = 0x4  # PF_EXITING of a task's flags


def process_of(pid: int) -> str:
    """What a process of this machine is called anywhere: boot, namespace, id. Empty where there is no /proc."""
    try:
        return f"{_here()} {pid}"
    except OSError:
        return ""


async def death(process: str) -> None:
    """Returns as soon as the process is ending, by its `process_of`; never where that cannot be seen from here."""
    here, _, pid = process.rpartition(" ")
    try:
        visible = here == _here()
    except OSError:
        visible = False
    if not visible:
        await asyncio.Event().wait()
    try:
        # A file that stays this process's, also when its id has become another's.
        stat = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    except OSError:
        return
    try:
        await _watches.setdefault(asyncio.get_running_loop(), _Watch()).ending(stat)
    finally:
        os.close(stat)


class _Watch:
    """Looks at all processes that an event loop waits for, with one timer: waking up costs more than looking."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[None], int] = {}
        self._looking = False

    async def ending(self, stat: int) -> None:
        """`stat`: an open file, as `_ending` reads it."""
        loop = asyncio.get_running_loop()
        if not self._looking:
            self._looking = True
            loop.call_soon(self._look)
        ended = loop.create_future()
        self._waiting[ended] = stat
        try:
            await ended
        finally:
            del self._waiting[ended]

    def _look(self) -> None:
        for ended, stat in self._waiting.items():
            if not ended.done() and _ending(stat):
                ended.set_result(None)
        self._looking = bool(self._waiting)
        if self._looking:
            asyncio.get_running_loop().call_later(LOOK_S, self._look)


_watches: WeakKeyDictionary[asyncio.AbstractEventLoop, _Watch] = WeakKeyDictionary()


def _here() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _ending(stat: int) -> bool:
    """By the /proc/PID/stat that is open there."""
    try:
        state, *fields = os.pread(stat, 1024, 0).rpartition(b")")[2].split()
    except (OSError, ValueError):  # it is gone
        return True
    return state in b"ZX" or bool(int(fields[5]) & EXITING)
