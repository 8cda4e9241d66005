"""Sessions on a state store that fails, hangs, or is written to by others: the right code, and nobody else is
disturbed."""

import asyncio
import errno
import threading
from pathlib import Path
from typing import Any

import fsspec
import grpc
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from protos.fathom.v1 import inference_pb2 as pb
from protos.fathom.v1 import sessions_pb2
from serving.config import GatewaySpec
from serving.errors import (
    AbortedError,
    DataLossError,
    FailedPreconditionError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from serving.sessions import sessions as module
from serving.sessions.records import GRACE_S, SESSION, SNAPSHOT
from serving.sessions.sessions import Sessions
from serving.sessions.store import StateStore
from serving.sessions.sweep import Sweeper
from tests import tiny
from tests.engine.fake import Clock
from tests.gateway.harness import house
from tests.gateway.ingress import patient  # noqa: F401  (used by being here)
from tests.gateway.test_sessions import GENERATE, SESSIONS, create, turn

OWNER = "ann"


class Faulty(MemoryFileSystem):
    """Fails with `fault` where it is written to (or, with `reads`, at all)."""

    protocol = ("faulty",)
    store: dict[str, Any] = {}  # noqa: RUF012  (as the base has it: of the class)
    pseudo_dirs = [""]  # noqa: RUF012
    fault: OSError | None = None
    reads = False
    cachable = False

    def _check(self, reading: bool) -> None:
        if Faulty.fault is not None and (Faulty.reads or not reading):
            raise Faulty.fault

    def pipe_file(self, *given: Any, **named: Any) -> Any:
        self._check(False)
        return super().pipe_file(*given, **named)

    def rm_file(self, *given: Any, **named: Any) -> Any:
        self._check(False)
        return super().rm_file(*given, **named)

    def cat_file(self, *given: Any, **named: Any) -> Any:
        self._check(True)
        return super().cat_file(*given, **named)

    def ls(self, *given: Any, **named: Any) -> Any:
        self._check(True)
        return super().ls(*given, **named)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> type[Faulty]:
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    for name, value in (("store", {}), ("pseudo_dirs", [""]), ("fault", None), ("reads", False)):
        monkeypatch.setattr(Faulty, name, value)
    return Faulty


def sessions_at(url: object, most: int = 100) -> Sessions:
    return Sessions(StateStore(str(url)), ttl_s=100, most=most)


async def made(sessions: Sessions, tokens: list[int], state: bytes, ttl_s: float | None = None) -> str:
    record = await sessions.create(OWNER, "m", "f", ttl_s)
    async with sessions.turn(OWNER, record.id, "m", "f") as one:
        await one.commit(tokens, state)
    return record.id


@pytest.mark.parametrize(
    ("code", "reads"),
    [
        (errno.ENOSPC, False),
        (errno.EROFS, False),
        (errno.EACCES, True),
        (errno.ESTALE, True),
        (errno.EIO, True),
    ],
)
async def test_a_store_that_fails(tmp_path: Path, faulty: type[Faulty], code: int, reads: bool) -> None:
    folder = tiny.checkpoint(tmp_path / "tiny")
    async with house(folder, gateway=GatewaySpec(state_store="faulty://states")) as h:
        session_id = await create(h)
        first, _, _ = await turn(h, session_id, [1, 2, 3])
        faulty.fault, faulty.reads = OSError(code, "No luck", "/secret/path"), reads
        ids, _, told = await turn(h, session_id, [4])
        assert told is grpc.StatusCode.UNAVAILABLE
        # A turn that cannot be kept has been said, and ends with the error.
        assert len(ids) == (0 if reads else 6)
        session = {"session_id": session_id}
        asked = [
            ("Create", sessions_pb2.CreateSessionRequest()),
            ("Fork", sessions_pb2.ForkSessionRequest(**session)),
            ("Snapshot", sessions_pb2.SnapshotSessionRequest(**session)),
            ("Delete", sessions_pb2.DeleteSessionRequest(**session)),
            *([("Get", sessions_pb2.GetSessionRequest(**session))] if reads else []),
            *([("List", sessions_pb2.ListSessionsRequest())] if reads else []),
        ]
        for method, request in asked:
            _, context = await h.unary(SESSIONS + method, request)
            assert context.code is grpc.StatusCode.UNAVAILABLE, method
            assert "No luck" in context.details and "secret" not in context.details
        messages, context = await h.stream(
            GENERATE, pb.GenerateRequest(text="a", sampling=pb.SamplingParams(max_tokens=2))
        )
        assert context.code is grpc.StatusCode.OK and messages
        faulty.fault = None
        kept, _ = await h.unary(SESSIONS + "Get", sessions_pb2.GetSessionRequest(**session))
        assert kept.tokens == 3 + len(first) and kept.turns == 1  # type: ignore[attr-defined]
        assert (await turn(h, session_id, [4]))[2] is grpc.StatusCode.OK
        assert sum(".safetensors" in name for name in faulty.store) == 1
        await h.idle()


async def test_a_full_disk_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StateStore(str(tmp_path))
    store.put("a/b", b"before")

    def full(path: str, data: bytes) -> None:
        Path(path).write_bytes(data[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store._fs, "pipe_file", full)
    with pytest.raises(UnavailableError, match="written to: No space left on device"):
        store.put("a/b", b"after")
    assert store.get("a/b") == b"before"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


async def test_a_store_that_hangs_holds_up_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STORE_S", 0.3)
    sessions, go = sessions_at(tmp_path), threading.Event()
    monkeypatch.setattr(sessions._records._store, "get", lambda _: go.wait(30) and b"")
    asked = [asyncio.create_task(sessions.get(OWNER, "somesession")) for _ in range(200)]
    await asyncio.sleep(0.05)
    assert await asyncio.wait_for(asyncio.to_thread(lambda: 1), 0.2) == 1  # tokenizers have threads, too
    for told in await asyncio.gather(*asked, return_exceptions=True):
        assert isinstance(told, UnavailableError)
    go.set()


async def test_a_fork_while_a_turn_is_committed_has_one_of_the_two(tmp_path: Path) -> None:
    sessions = sessions_at(tmp_path)
    session_id = await made(sessions, [1, 2], b"old")
    store, read = sessions._records._store, sessions._records._store.get

    def get(path: str) -> bytes:
        found = read(path)
        if path.endswith(".json") and store.get is get:
            store.get = read  # type: ignore[method-assign]
            other = sessions_at(tmp_path)  # another gateway
            asyncio.run(_next_turn(other, session_id))
        return found

    store.get = get  # type: ignore[method-assign]
    fork = await sessions.fork(OWNER, session_id, None)
    assert fork.tokens == [1, 2, 3]
    assert await asyncio.to_thread(sessions._records.state, fork) == b"new"


async def _next_turn(sessions: Sessions, session_id: str) -> None:
    async with sessions.turn(OWNER, session_id, "m", "f") as one:
        await one.commit([1, 2, 3], b"new")


async def test_a_session_is_not_deleted_under_a_turn_nor_brought_back_by_one(tmp_path: Path) -> None:
    sessions = sessions_at(tmp_path)
    session_id = await made(sessions, [1], b"state")
    async with sessions.turn(OWNER, session_id, "m", "f"):
        with pytest.raises(FailedPreconditionError):
            await sessions.delete(OWNER, SESSION, session_id)
    deleting = asyncio.create_task(sessions.delete(OWNER, SESSION, session_id))
    await asyncio.sleep(0)
    with pytest.raises(FailedPreconditionError):
        async with sessions.turn(OWNER, session_id, "m", "f"):
            pass
    await deleting
    with pytest.raises(NotFoundError):
        await sessions.get(OWNER, session_id)
    session_id = await made(sessions, [1], b"state")
    async with sessions.turn(OWNER, session_id, "m", "f") as one:
        await sessions_at(tmp_path).delete(OWNER, SESSION, session_id)  # through another gateway
        with pytest.raises(NotFoundError):
            await one.commit([1, 2], b"newer")
    sweeper = Sweeper(StateStore(str(tmp_path)))
    for _ in range(2):
        sweeper.sweep()
    assert not files(tmp_path)


async def test_no_more_are_made_at_once_than_are_allowed(tmp_path: Path) -> None:
    sessions = sessions_at(tmp_path, most=5)
    told = await asyncio.gather(
        *(sessions.create(OWNER, "m", "f", None) for _ in range(20)), return_exceptions=True
    )
    assert sum(isinstance(one, OverloadedError) for one in told) == 15
    assert len(await sessions.all(OWNER)) == 5


async def test_what_is_damaged_can_be_deleted(tmp_path: Path) -> None:
    sessions = sessions_at(tmp_path)
    session_id = await made(sessions, [1], b"state")
    snapshot = await sessions.snapshot(OWNER, session_id, None)
    for kind, record_id in ((SESSION, session_id), (SNAPSHOT, snapshot.id)):
        (record,) = tmp_path.rglob(f"{record_id}.json")
        for damaged in (b"", record.read_bytes()[:-4], b"[" * 100_000, b"[]", b"\xff"):
            record.write_bytes(damaged)
            with pytest.raises(DataLossError):
                await asyncio.to_thread(sessions._records.read, OWNER, kind, record_id)
        await sessions.delete(OWNER, kind, record_id)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


async def test_records_and_states_of_others_are_not_taken_for_ones_own(tmp_path: Path) -> None:
    sessions = sessions_at(tmp_path)
    one, two = await made(sessions, [1], b"one"), await made(sessions, [2], b"two")
    files = {record: next(tmp_path.rglob(f"{record}.json")) for record in (one, two)}
    states = {record: next(tmp_path.rglob(f"{record}.*.safetensors")) for record in (one, two)}
    kept = files[one].read_bytes()
    states[one].write_bytes(states[two].read_bytes())
    with pytest.raises(DataLossError):
        await sessions.fork(OWNER, one, None)
    files[one].write_bytes(files[two].read_bytes())
    with pytest.raises(NotFoundError):
        await sessions.fork(OWNER, one, None)
    files[one].write_bytes(kept)
    other = await sessions.create("bob", "m", "f", None)
    next(tmp_path.rglob(f"{other.id}.json")).write_bytes(kept)
    with pytest.raises(NotFoundError):
        await sessions.get("bob", other.id)
    assert (await sessions.fork(OWNER, two, None)).tokens == [2]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(1e9)
    monkeypatch.setattr("time.time", clock)
    return clock


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


async def test_a_session_does_not_expire_under_its_turn(tmp_path: Path, now: Clock) -> None:
    """100 seconds without use, and a turn of 500; another gateway looks, and sweeps, meanwhile."""
    sessions, other = sessions_at(tmp_path), sessions_at(tmp_path)
    session_id = await made(sessions, [1], b"state")
    async with sessions.turn(OWNER, session_id, "m", "f", lasts_s=600) as one:
        for _ in range(5):
            now.now += 100
            assert [record.id for record in await other.all(OWNER)] == [session_id]
            other._sweeper.sweep()
        await one.commit([1, 2], b"newer")
    now.now += 99
    assert (await other.get(OWNER, session_id)).tokens == [1, 2]
    async with sessions.turn(OWNER, session_id, "m", "f", lasts_s=600):
        now.now += 500  # cancelled then
    now.now += 99
    assert (await other.get(OWNER, session_id)).turns == 2, "it was used, and stayed as it was"
    now.now += 2
    with pytest.raises(NotFoundError):
        await other.get(OWNER, session_id)


async def test_what_has_expired_is_taken_out_of_the_store(tmp_path: Path, now: Clock) -> None:
    sessions, sweeper = sessions_at(tmp_path), Sweeper(StateStore(str(tmp_path)))
    brief = await made(sessions, [1], b"brief")
    lasting = await made(sessions, [2], b"lasting", 1000)
    damaged = await made(sessions, [3], b"damaged")
    next(tmp_path.rglob(f"{damaged}.json")).write_bytes(b"[")
    store = sessions._records._store
    owner = store.list("")[0]
    store.put(f"{owner}/states/{brief}x.abc.safetensors", b"of a writer that was killed before its record")
    store.put(f"{owner}/states/{lasting}.abc.safetensors", b"or before its next one")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine").write_text("somebody else's")
    before = files(tmp_path)
    sweeper.sweep()
    assert files(tmp_path) == before, "nothing has expired, and what leads nowhere may just have been begun"
    now.now += 101 + GRACE_S
    async with sessions.turn(OWNER, lasting, "m", "f") as one:
        await one.commit([2, 2], b"lasting, newer")
    sweeper.sweep()
    left = {name.partition(".")[0] for name in files(tmp_path)}
    assert left == {lasting, damaged, "mine"}
    assert (await sessions.fork(OWNER, lasting, None)).tokens == [2, 2]
    assert len(files(tmp_path / owner / "states")) == 3


@pytest.mark.parametrize("url", ["", "file://", "memory://"])
async def test_what_a_killed_writer_leaves_is_taken_out_of_the_store(tmp_path: Path, url: str) -> None:
    sessions = sessions_at(url + str(tmp_path))
    session_id = await made(sessions, [1], b"state")
    await sessions.snapshot(OWNER, session_id, None)
    store = sessions._records._store
    (owner,) = store.list("")
    before = {folder: store.list(f"{owner}/{folder}") for folder in store.list(owner)}
    assert set(before) == {"sessions", "snapshots", "states", "versions"}
    left = [f"{owner}/{folder}/{session_id}.{folder}.1a2b3c4d.partial" for folder in before]
    for path in left:
        store._fs.pipe_file(f"{store._root}/{path}", b"half of")
    sweeper = Sweeper(store)
    sweeper.sweep()
    assert all(map(store._fs.exists, (f"{store._root}/{path}" for path in left))), "they may be being written"
    sweeper.sweep()
    assert not any(store.list(f"{owner}/{folder}", partial=True) for folder in before)
    assert {folder: store.list(f"{owner}/{folder}") for folder in before} == before
    assert (await sessions.fork(OWNER, session_id, None)).tokens == [1]


@pytest.mark.parametrize("url", ["", "file://"])
async def test_nobody_sees_half_of_what_is_being_written_and_sweeping_does_not_disturb_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    store, sweeper = StateStore(url + str(tmp_path)), Sweeper(StateStore(str(tmp_path)))
    folder = f"{'0' * 24}/states"
    write = store._fs.pipe_file

    def slowly(path: str, data: bytes, **named: Any) -> None:
        write(path, data[:2], **named)
        sweeper.sweep()
        assert store.list(folder) == []
        write(path, data)

    monkeypatch.setattr(store._fs, "pipe_file", slowly)
    assert store.create(f"{folder}/one", b"created")
    assert store.get(f"{folder}/one") == b"created" and not store.list(folder, partial=True)


class Slow(StateStore):
    """Everybody waits before they create until all are there."""

    def __init__(self, url: str, barrier: threading.Barrier):
        super().__init__(url)
        self._barrier = barrier

    def create(self, path: str, data: bytes) -> bool:
        self._barrier.wait(30)
        return super().create(path, data)


@pytest.mark.parametrize("url", ["", "memory://states"])
async def test_of_turns_that_are_committed_at_one_instant_one_is_kept(tmp_path: Path, url: str) -> None:
    url = f"{url}/{tmp_path.name}" if url else str(tmp_path)
    session_id = await made(sessions_at(url), [1], b"state")
    for round_ in range(3):
        barrier = threading.Barrier(4)
        gateways = [Sessions(Slow(url, barrier), ttl_s=100, most=100) for _ in range(4)]
        before = await gateways[0].get(OWNER, session_id)

        async def commit(number: int, gateways: list[Sessions] = gateways, round_: int = round_) -> int:
            async with gateways[number].turn(OWNER, session_id, "m", "f") as one:
                await one.commit([round_, number], f"{round_} {number}".encode())
            return number

        told = await asyncio.gather(*map(commit, range(4)), return_exceptions=True)
        (winner,) = [one for one in told if isinstance(one, int)]
        assert sum(isinstance(one, AbortedError) for one in told) == 3
        fork = await sessions_at(url).fork(OWNER, session_id, None)
        assert fork.tokens == [round_, winner] and fork.turns == before.turns + 1
        states = sessions_at(url)._records
        assert states.state(fork) == f"{round_} {winner}".encode()
        owner = states._store.list("")[0]
        assert len([n for n in states._store.list(f"{owner}/states") if n.startswith(session_id)]) == 1
        assert len([n for n in states._store.list(f"{owner}/versions") if n.startswith(session_id)]) == 1


async def test_a_turn_is_kept_whose_gateway_dies_while_it_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = sessions_at(tmp_path)
    session_id = await made(sessions, [1], b"state")
    store = sessions._records._store
    put = store.put

    def killed(path: str, data: bytes) -> None:
        if path.endswith(".json"):
            raise KeyboardInterrupt
        put(path, data)

    monkeypatch.setattr(store, "put", killed)
    record = await sessions.get(OWNER, session_id)
    with pytest.raises(KeyboardInterrupt):
        sessions._records.update(record, b"newer", tokens=[1, 2])
    other = sessions_at(tmp_path)
    async with other.turn(OWNER, session_id, "m", "f") as one:
        assert one.record.tokens == [1, 2] and one.state == b"newer"
        await one.commit([1, 2, 3], b"newest")
    with pytest.raises(AbortedError):
        other._records.update(record, b"older", tokens=[1, 9])
    assert (await other.get(OWNER, session_id)).tokens == [1, 2, 3]
    await other.delete(OWNER, SESSION, session_id)
    assert len(files(tmp_path)) == 2, (
        "the state before the one that was committed when it died, and the deletion"
    )
    sweeper = Sweeper(store)
    for _ in range(2):
        sweeper.sweep()
    assert not files(tmp_path)
