"""Turns, deletions and readers of one session, through gateways of their own, in any order of their operations on the
store: a turn is kept or lost as a whole, and a session that was deleted stays so."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import AbortedError, NotFoundError
from serving.sessions import sessions as module
from serving.sessions.records import GRACE_S, SESSION, Record, Records
from serving.sessions.store import StateStore
from serving.sessions.sweep import Sweeper
from tests.engine.fake import Clock

OWNER, ID = "ann", "session-of-ann"
NUMBERS = count()


class Killed(BaseException):
    """The gateway is."""


class Actor(StateStore):
    """A gateway that does one thing in a thread of its own, and waits before each of its operations on the store."""

    def __init__(self, url: str, does: Callable[["Actor"], object]):
        super().__init__(url)
        self.told: object = None
        self.over = False
        self._does = does
        self._kill = False
        self._go, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._act, daemon=True)
        self._thread.start()
        assert self._waits.acquire(timeout=30)

    def step(self, *, kill: bool = False) -> None:
        """Its next operation, and what it does after that without the store."""
        self._kill = kill
        self._go.release()
        assert self._waits.acquire(timeout=30)
        if self.over:
            self._thread.join(30)

    def _act(self) -> None:
        try:
            self.told = self._does(self)
        except (Exception, Killed) as error:
            self.told = error
        self.over = True
        self._waits.release()

    def _wait(self) -> None:
        self._waits.release()
        self._go.acquire()
        if self._kill:
            raise Killed

    def put(self, path: str, data: bytes) -> None:
        self._wait()
        super().put(path, data)

    def create(self, path: str, data: bytes) -> bool:
        self._wait()
        return super().create(path, data)

    def get(self, path: str) -> bytes:
        self._wait()
        return super().get(path)

    def delete(self, path: str) -> None:
        self._wait()
        super().delete(path)

    def list(self, folder: str, *, partial: bool = False) -> list[str]:
        self._wait()
        return super().list(folder, partial=partial)


async def _unused(*_: Any) -> Record:
    raise AssertionError


def turn(store: StateStore) -> Record:
    """Generates what nobody else does."""
    records = Records(store)
    record, state = records.whole(OWNER, SESSION, ID)
    one = module.Turn(record, state, records, _unused)
    number = next(NUMBERS)
    return one._commit([*record.tokens, number], str(number).encode())


def delete(store: StateStore) -> str:
    Records(store).delete(OWNER, SESSION, ID)
    return "deleted"


def look(store: StateStore) -> list[Record]:
    return [Records(store).whole(OWNER, SESSION, ID)[0]]


def look_through(store: StateStore) -> list[Record]:
    return Records(store).all(OWNER)


def begun(store: StateStore) -> Record:
    now = time.time()
    return Records(store).add(Record(ID, SESSION, OWNER, "m", "f", 1000.0, now, now), b"state")


STEPS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=80)


@pytest.mark.parametrize("killed", [False, True], ids=["all live on", "some are killed"])
@given(
    doing=st.lists(st.sampled_from([turn, turn, delete, look, look_through]), min_size=2, max_size=4),
    steps=STEPS,
)
def test_a_deleted_session_never_comes_back(
    killed: bool, doing: list[Callable[[StateStore], object]], steps: list[tuple[int, int]]
) -> None:
    url = f"memory://races/{next(NUMBERS)}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.time", clock := Clock(1e9))
        store = StateStore(url)
        begun(store)
        actors = [Actor(url, does) for does in doing]
        deleted = False
        for index, chance in steps:
            actor = actors[index % len(actors)]
            if not actor.over:
                actor.step(kill=killed and chance == 0)
                deleted |= actor.told == "deleted"
                if deleted:
                    _is_gone(store)
        for actor in actors:
            while not actor.over:
                actor.step()
            deleted |= actor.told == "deleted"
        told = [actor.told for actor in actors]
        lost = (AbortedError, NotFoundError, Killed)
        for does, one in zip(doing, told, strict=True):
            if does is turn:
                assert isinstance(one, (Record, *lost))
            elif does is delete:
                assert one == "deleted" or isinstance(one, (NotFoundError, Killed))
            else:
                assert isinstance(one, (list, NotFoundError, Killed))
        assert sum(one == "deleted" for one in told) <= 1
        kept = [one for one in told if isinstance(one, Record)]
        assert len({one.version for one in kept}) == len(kept)
        if deleted:
            _is_gone(store)
        elif delete not in doing and not killed:
            record, state = Records(store).whole(OWNER, SESSION, ID)
            newest = max(kept, key=lambda one: one.version, default=None)
            assert record.tokens == (newest.tokens if newest else [])
            assert state == (str(record.tokens[-1]).encode() if newest else b"state")
        sweeper = Sweeper(store)
        clock.now += GRACE_S + 5
        for _ in range(3):
            sweeper.sweep()
            if deleted:
                _is_gone(store)
        if not deleted:
            with suppress(NotFoundError):
                Records(store).whole(OWNER, SESSION, ID)
            clock.now += 1000
            for _ in range(3):
                sweeper.sweep()
        assert not [path for path in store._fs.find(store._root) if path]


def _is_gone(store: StateStore) -> None:
    with pytest.raises(NotFoundError):
        Records(store).whole(OWNER, SESSION, ID)
    assert Records(store).all(OWNER) == []


def test_what_a_deletion_leaves_goes_with_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself, so that short sessions do not pile up between sweeps."""
    monkeypatch.setattr("time.time", clock := Clock(1e9))
    store = StateStore(f"memory://races/{next(NUMBERS)}")
    records = Records(store)
    for _ in range(50):
        begun(store)
        turn(store)
        records.delete(OWNER, SESSION, ID)
        clock.now += GRACE_S / 4
        begun(store)
        assert len(store._fs.find(store._root)) <= 2 + 2 * 5
        records.delete(OWNER, SESSION, ID)
        clock.now += 1


async def test_a_session_is_deleted_whose_next_version_is_damaged() -> None:
    url = f"memory://races/{next(NUMBERS)}"
    sessions = module.Sessions(StateStore(url), ttl_s=100, most=100)
    record = await sessions.create(OWNER, "m", "f", None)
    store = sessions._records._store
    (owner,) = store.list("")
    store.put(f"{owner}/versions/{record.life}.{record.version + 1}", b"[")
    with pytest.raises(AbortedError):
        async with sessions.turn(OWNER, record.id, "m", "f") as one:
            await one.commit([1], b"state")
    await sessions.delete(OWNER, SESSION, record.id)
    with pytest.raises(NotFoundError):
        await sessions.get(OWNER, record.id)
