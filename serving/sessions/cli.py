"""The command ``fathom sessions``."""

import json
from typing import Annotated

import grpc
import typer

from protos.fathom.v1 import sessions_pb2 as pb
from protos.fathom.v1 import sessions_pb2_grpc
from serving import client
from serving.target import Target

app = typer.Typer(no_args_is_help=True, help="Conversations whose state the server keeps.")

Ttl = Annotated[float | None, typer.Option("--ttl", help="seconds without use until it is forgotten")]
Session = Annotated[str, typer.Argument(help="its id")]


def _stub(channel: grpc.Channel) -> sessions_pb2_grpc.SessionsStub:
    return sessions_pb2_grpc.SessionsStub(channel)


def _show(message: pb.Session | pb.SessionSnapshot | pb.ListSessionsResponse) -> None:
    typer.echo(json.dumps(client.as_dict(message)))


@app.command()
def create(target: Target, model: str = "", ttl: Ttl = None) -> None:
    """An empty session."""
    with client.connected(target) as channel:
        _show(_stub(channel).Create(pb.CreateSessionRequest(model=model, ttl_s=ttl)))


@app.command()
def fork(session: Session, target: Target, ttl: Ttl = None) -> None:
    """Another session that goes on from the same point."""
    with client.connected(target) as channel:
        _show(_stub(channel).Fork(pb.ForkSessionRequest(session_id=session, ttl_s=ttl)))


@app.command()
def snapshot(session: Session, target: Target, ttl: Ttl = None) -> None:
    """A point to come back to."""
    with client.connected(target) as channel:
        _show(_stub(channel).Snapshot(pb.SnapshotSessionRequest(session_id=session, ttl_s=ttl)))


@app.command()
def restore(snapshot: Session, target: Target, ttl: Ttl = None) -> None:
    """A new session that goes on from a snapshot."""
    with client.connected(target) as channel:
        _show(_stub(channel).Restore(pb.RestoreSessionRequest(snapshot_id=snapshot, ttl_s=ttl)))


@app.command("list")
def list_(target: Target) -> None:
    """All sessions and snapshots."""
    with client.connected(target) as channel:
        _show(_stub(channel).List(pb.ListSessionsRequest()))


@app.command()
def delete(session: Session, target: Target) -> None:
    """A session."""
    with client.connected(target) as channel:
        _stub(channel).Delete(pb.DeleteSessionRequest(session_id=session))
