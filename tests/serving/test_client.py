"""A stream that breaks under our client goes on where it was."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest

from protos.fathom.v1 import inference_pb2 as pb
from protos.fathom.v1 import inference_pb2_grpc
from serving import client

IDS = list(range(10, 20))


class Breaking(inference_pb2_grpc.InferenceServicer):
    """Says two tokens of each request, then breaks, `times` over."""

    def __init__(self, times: int, code: grpc.StatusCode, details: str):
        self.asked: list[pb.GenerateRequest] = []
        self._times, self._code, self._details = times, code, details

    def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        self.asked.append(request)
        had = len(request.resumed_token_ids)
        assert list(request.resumed_token_ids) == IDS[:had]
        if len(self.asked) > self._times:
            yield pb.GenerateResponse(token_ids=IDS[had:])
            return
        if had < 4:
            yield pb.GenerateResponse(token_ids=IDS[had : had + 2])
        context.abort(self._code, self._details)


@contextmanager
def serving(servicer: Breaking) -> Iterator[grpc.Channel]:
    server = grpc.server(ThreadPoolExecutor(2))
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        server.stop(None)


def said(channel: grpc.Channel, n: int = 1) -> list[int]:
    request = pb.GenerateRequest(text="def", sampling=pb.SamplingParams(n=n))
    return [i for message in client.generate(channel, request) for i in message.token_ids]


@pytest.mark.parametrize(
    ("code", "details"),
    [
        (grpc.StatusCode.UNAVAILABLE, "Socket closed"),
        (grpc.StatusCode.INTERNAL, "The actor died unexpectedly before finishing this task."),
        (grpc.StatusCode.INTERNAL, "The actor a2 is unavailable: Actor is unavailable.."),
        (grpc.StatusCode.CANCELLED, "Stream removed (RST_STREAM (Received RST_STREAM with error code 8))"),
    ],
    ids=["gone", "died", "unavailable", "reset"],
)
def test_the_first_try_comes_at_once_and_later_ones_wait(
    code: grpc.StatusCode, details: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(client.time, "sleep", slept.append)
    servicer = Breaking(5, code, details)
    with serving(servicer) as channel:
        assert said(channel) == IDS
    assert len({request.request_id for request in servicer.asked}) == 1
    assert len(servicer.asked) == 6
    assert slept == [client.AGAIN_S] * 3  # after each of the breaks that nothing was said before


@pytest.mark.parametrize(
    ("code", "n"),
    [(grpc.StatusCode.INTERNAL, 1), (grpc.StatusCode.CANCELLED, 1), (grpc.StatusCode.UNAVAILABLE, 2)],
)
def test_what_is_no_broken_stream_is_raised(code: grpc.StatusCode, n: int) -> None:
    servicer = Breaking(1, code, "something else")
    with serving(servicer) as channel, pytest.raises(grpc.RpcError):
        said(channel, n)
    assert len(servicer.asked) == 1
