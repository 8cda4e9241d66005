"""The death of a process, noticed before its sockets close.

The kernel first takes down a killed process's memory, tenths of a second for an engine on a busy machine, and only then
closes what it had open. That it is on its way out shows at once in /proc, to processes under the same kernel and in
the same namespace of process ids. Others have to wait for the end of the stream.
"""

import asyncio
import os
from pathlib import Path

LOOK_S = 0.02
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
    while not _ending(int(pid)):
        await asyncio.sleep(LOOK_S)


def _here() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _ending(pid: int) -> bool:
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return True
    return state in "ZX" or bool(int(fields[5]) & EXITING)
