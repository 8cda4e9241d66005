"""The gRPC side of the fake server: fathom.v1 and the Open Inference Protocol."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from loadtest.fake.source import Fake, RefusedError
from loadtest.http2 import (
    END_HEADERS,
    END_STREAM,
    HEADERS,
    Http2,
    Stream,
    frame,
    header_block,
    prefixed,
)
from loadtest.transports.channel import STATUS
from protos.fathom.v1 import inference_pb2, models_pb2
from protos.inference import grpc_service_pb2 as oip

_BEGIN = header_block([(":status", "200"), ("content-type", "application/grpc")])
_OK = header_block([("grpc-status", "0")])


class Answer(Stream):
    """The server's end of a call."""

    __slots__ = ("_begun", "_connection", "_method", "finished")

    def __init__(self, connection: GrpcEnd, method: Method):
        super().__init__()
        self._connection = connection
        self._method = method
        self._begun = False
        self.finished = False

    def on_message(self, now: float, message: bytes) -> None:
        try:
            self._method(now, message, self)
        except RefusedError as refusal:
            self.fail(refusal.status, str(refusal))

    @property
    def open(self) -> bool:
        return not self.finished and self.number in self._connection.streams

    def send(self, message: bytes, last: bool) -> bool:
        """Whether the client still listens."""
        if not self.open:
            return False
        opening = b"" if self._begun else frame(HEADERS, END_HEADERS, self.number, _BEGIN)
        tail = frame(HEADERS, END_HEADERS | END_STREAM, self.number, _OK) if last else b""
        self._begun = True
        self._connection.send(self, opening, prefixed(message), tail)
        self.finished = last
        if last and not self.held:
            del self._connection.streams[self.number]
        return True

    def fail(self, status: str, detail: str) -> None:
        if self.open:
            fields = [("grpc-status", str(STATUS.index(status))), ("grpc-message", quote(detail))]
            if not self._begun:
                fields = [(":status", "200"), ("content-type", "application/grpc"), *fields]
            del self._connection.streams[self.number]
            tail = frame(HEADERS, END_HEADERS | END_STREAM, self.number, header_block(fields))
            self._connection.transport.write(tail)
            self.finished = True


Method = Callable[[float, bytes, Answer], None]
"""(when the request message was read, the message, its answer): to be answered then or later."""


class GrpcEnd(Http2):
    """A server's end of a connection. The client's preface has been read."""

    def __init__(self, served: dict[bytes, Method]):
        super().__init__()
        self._served = served

    def feed(self, data: bytes) -> None:
        """Bytes that were read before this took over."""
        while data:
            room = self.get_buffer(-1)
            part, data = data[: len(room)], data[len(room) :]
            room[: len(part)] = part
            self.buffer_updated(len(part))

    def on_headers(self, now: float, number: int, fields: dict[bytes, bytes], ended: bool) -> None:
        path = fields.get(b":path", b"")
        answer = Answer(self, self._served.get(path, _ignore))
        self.adopt(number, answer)
        if path not in self._served:
            answer.fail("UNIMPLEMENTED", f"no method {path.decode()}")

    def on_data_end(self, now: float, number: int) -> None:
        pass

    def on_reset(self, now: float, number: int, code: int) -> None:
        self.streams.pop(number, None)

    def on_broken(self, now: float, reason: str) -> None:
        self.streams.clear()


def _ignore(now: float, message: bytes, answer: Answer) -> None:
    """Of a call that was refused already."""


def methods(fake: Fake) -> dict[bytes, Method]:
    """By path."""
    fathom, open_inference = _Fathom(fake), _Oip(fake)
    return {
        b"/fathom.v1.Inference/Generate": fathom.generate,
        b"/fathom.v1.Models/List": fathom.list,
        b"/inference.GRPCInferenceService/ServerLive": _constant(oip.ServerLiveResponse(live=True)),
        b"/inference.GRPCInferenceService/ServerReady": _constant(oip.ServerReadyResponse(ready=True)),
        b"/inference.GRPCInferenceService/ModelReady": _constant(oip.ModelReadyResponse(ready=True)),
        b"/inference.GRPCInferenceService/RepositoryIndex": open_inference.index,
        b"/inference.GRPCInferenceService/ModelMetadata": open_inference.metadata,
        b"/inference.GRPCInferenceService/ModelInfer": open_inference.infer,
        b"/inference.GRPCInferenceService/ModelStreamInfer": open_inference.stream_infer,
    }


def _constant(response: Any) -> Method:
    message = response.SerializeToString()

    def method(now: float, request: bytes, answer: Answer) -> None:
        answer.send(message, True)

    return method


def _known(fake: Fake, name: str) -> None:
    if name not in ("", fake.behaviour.model):
        raise RefusedError("NOT_FOUND", f"model {name}: must be {fake.behaviour.model}")


class _Fathom:
    def __init__(self, fake: Fake):
        self._fake = fake

    def list(self, now: float, message: bytes, answer: Answer) -> None:
        behaviour = self._fake.behaviour
        model = models_pb2.Model(
            name=behaviour.model,
            family="fake",
            vocab_size=behaviour.vocab_size,
            max_tokens=behaviour.max_tokens,
            has_tokenizer=True,
            max_depth=behaviour.max_depth,
            depth_policies=["full", "fixed"],
        )
        answer.send(models_pb2.ListModelsResponse(models=[model]).SerializeToString(), True)

    def generate(self, now: float, message: bytes, answer: Answer) -> None:
        request = inference_pb2.GenerateRequest.FromString(message)
        _known(self._fake, request.model)
        asked = request.sampling.max_tokens or 128
        prompt = len(request.tokens.ids) or len(request.text.split())
        depth = request.depth.fixed or self._fake.behaviour.max_depth

        def emit(ids: list[int], last: bool) -> bool:
            response = inference_pb2.GenerateResponse(token_ids=ids, text=" t" * len(ids))
            if last:
                response.finish_reason = inference_pb2.LENGTH
                usage = response.usage
                usage.prompt_tokens, usage.completion_tokens, usage.mean_depth = prompt, asked, depth
                usage.flops_saved = 1 - depth / self._fake.behaviour.max_depth
            return answer.send(response.SerializeToString(), last)

        self._fake.generate(now, asked, emit)


class _Oip:
    """The tensors of Triton's language model backends."""

    def __init__(self, fake: Fake):
        self._fake = fake

    def index(self, now: float, message: bytes, answer: Answer) -> None:
        model = oip.RepositoryIndexResponse.ModelIndex(name=self._fake.behaviour.model, state="READY")
        answer.send(oip.RepositoryIndexResponse(models=[model]).SerializeToString(), True)

    def metadata(self, now: float, message: bytes, answer: Answer) -> None:
        _known(self._fake, oip.ModelMetadataRequest.FromString(message).name)
        response = oip.ModelMetadataResponse(name=self._fake.behaviour.model, platform="fake")
        for name, datatype in (("text_input", "BYTES"), ("stream", "BOOL"), ("sampling_parameters", "BYTES")):
            response.inputs.add(name=name, datatype=datatype, shape=[1])
        response.outputs.add(name="text_output", datatype="BYTES", shape=[-1])
        answer.send(response.SerializeToString(), True)

    def stream_infer(self, now: float, message: bytes, answer: Answer) -> None:
        request = oip.ModelInferRequest.FromString(message)

        def emit(ids: list[int], last: bool) -> bool:
            response = oip.ModelStreamInferResponse(infer_response=self._response(request, len(ids)))
            return answer.send(response.SerializeToString(), last)

        self._fake.generate(now, self._asked(request), emit)

    def infer(self, now: float, message: bytes, answer: Answer) -> None:
        request = oip.ModelInferRequest.FromString(message)
        asked = self._asked(request)

        def emit(ids: list[int], last: bool) -> bool:
            return (
                answer.send(self._response(request, asked).SerializeToString(), True) if last else answer.open
            )

        self._fake.generate(now, asked, emit)

    def _asked(self, request: oip.ModelInferRequest) -> int:
        _known(self._fake, request.model_name)
        for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
            if tensor.name == "sampling_parameters":
                return int(json.loads(raw[4:]).get("max_tokens", 16))
        return 16

    def _response(self, request: oip.ModelInferRequest, count: int) -> oip.ModelInferResponse:
        text = b" t" * count
        response = oip.ModelInferResponse(model_name=self._fake.behaviour.model, id=request.id)
        response.outputs.add(name="text_output", datatype="BYTES", shape=[1])
        response.raw_output_contents.append(struct.pack("<I", len(text)) + text)
        return response
