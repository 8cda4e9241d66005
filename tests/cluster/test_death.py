"""A process that is killed is seen to die; one that cannot be seen from here is nobody's business."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator

import pytest

from serving.cluster.death import death, process_of


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


async def test_a_killed_process_is_seen_to_die(child: subprocess.Popen[bytes]) -> None:
    assert process_of(child.pid).endswith(f" {child.pid}")
    dying = asyncio.ensure_future(death(process_of(child.pid)))
    await asyncio.sleep(0.1)
    assert not dying.done()
    child.kill()
    await asyncio.wait_for(dying, 5)  # while it still is a zombie
    child.wait()
    await asyncio.wait_for(death(process_of(child.pid)), 5)


async def test_many_are_watched_and_forgotten_alone(child: subprocess.Popen[bytes]) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        first, again, second = (
            asyncio.ensure_future(death(process_of(pid))) for pid in (child.pid, child.pid, other.pid)
        )
        await asyncio.sleep(0.05)
        again.cancel()
        child.kill()
        await asyncio.wait_for(first, 5)
        assert again.cancelled() and not second.done()
        other.kill()
        await asyncio.wait_for(second, 5)


@pytest.mark.parametrize("process", ["", "another-boot pid:[1] 1", "no process"])
async def test_what_cannot_be_seen_from_here_does_not_die(process: str) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(death(process), 0.1)
