"""The gRPC door of sessions: fathom.v1.Sessions."""

from collections.abc import Mapping

from google.protobuf.message import Message

from protos.fathom.v1 import sessions_pb2 as pb
from serving.errors import InvalidArgumentError
from serving.gateway.convert import parse
from serving.gateway.fleet import Fleet
from serving.gateway.keys import Keys, credential_of
from serving.sessions.records import SESSION, SNAPSHOT, Record
from serving.sessions.sessions import Sessions

Metadata = Mapping[str, str]


class SessionsRpc:
    """One method for each RPC."""

    def __init__(self, sessions: Sessions, fleet: Fleet, keys: Keys):
        self._sessions = sessions
        self._fleet = fleet
        self._keys = keys
        self.unary = {
            ("fathom.v1.Sessions", "Create"): self._create,
            ("fathom.v1.Sessions", "Get"): self._get,
            ("fathom.v1.Sessions", "Fork"): self._fork,
            ("fathom.v1.Sessions", "Snapshot"): self._snapshot,
            ("fathom.v1.Sessions", "Restore"): self._restore,
            ("fathom.v1.Sessions", "List"): self._list,
            ("fathom.v1.Sessions", "Delete"): self._delete,
        }

    async def _create(self, body: bytes, metadata: Metadata) -> Message:
        request = parse(pb.CreateSessionRequest, body)
        caller = self._keys.authenticate(credential_of(metadata))
        model = self._fleet.resolve(request.model)
        caller.check(model)
        description, _ = self._fleet.describe(model)
        record = await self._sessions.create(caller.name, model, description.identity, _ttl(request))
        return session_from(record)

    async def _get(self, body: bytes, metadata: Metadata) -> Message:
        request = parse(pb.GetSessionRequest, body)
        return session_from(await self._sessions.get(self._owner(metadata), request.session_id))

    async def _fork(self, body: bytes, metadata: Metadata) -> Message:
        request = parse(pb.ForkSessionRequest, body)
        owner = self._owner(metadata)
        return session_from(await self._sessions.fork(owner, request.session_id, _ttl(request)))

    async def _snapshot(self, body: bytes, metadata: Metadata) -> Message:
        request = parse(pb.SnapshotSessionRequest, body)
        owner = self._owner(metadata)
        return snapshot_from(await self._sessions.snapshot(owner, request.session_id, _ttl(request)))

    async def _restore(self, body: bytes, metadata: Metadata) -> Message:
        request = parse(pb.RestoreSessionRequest, body)
        served = {
            m: self._fleet.describe(m)[0].identity for m in self._fleet.models if self._fleet.replicas(m)
        }
        owner = self._owner(metadata)
        return session_from(await self._sessions.restore(owner, request.snapshot_id, served, _ttl(request)))

    async def _list(self, body: bytes, metadata: Metadata) -> Message:
        parse(pb.ListSessionsRequest, body)
        records = await self._sessions.all(self._owner(metadata))
        return pb.ListSessionsResponse(
            sessions=[session_from(r) for r in records if r.kind == SESSION],
            snapshots=[snapshot_from(r) for r in records if r.kind == SNAPSHOT],
        )

    async def _delete(self, body: bytes, metadata: Metadata) -> Message:
        request = parse(pb.DeleteSessionRequest, body)
        what = request.WhichOneof("what")
        if what is None:
            raise InvalidArgumentError("what", None, "must be a session_id or a snapshot_id")
        kind = SESSION if what == "session_id" else SNAPSHOT
        await self._sessions.delete(self._owner(metadata), kind, getattr(request, what))
        return pb.DeleteSessionResponse()

    def _owner(self, metadata: Metadata) -> str:
        return self._keys.authenticate(credential_of(metadata)).name


def session_from(record: Record) -> pb.Session:
    return pb.Session(
        session_id=record.id,
        model=record.model,
        tokens=len(record.tokens),
        turns=record.turns,
        created=record.created,
        expires=record.expires,
        state_bytes=record.state_bytes,
    )


def snapshot_from(record: Record) -> pb.SessionSnapshot:
    return pb.SessionSnapshot(
        snapshot_id=record.id,
        session_id=record.origin,
        model=record.model,
        tokens=len(record.tokens),
        created=record.created,
        expires=record.expires,
        state_bytes=record.state_bytes,
    )


def _ttl(
    request: pb.CreateSessionRequest
    | pb.ForkSessionRequest
    | pb.SnapshotSessionRequest
    | pb.RestoreSessionRequest,
) -> float | None:
    return request.ttl_s if request.HasField("ttl_s") else None
