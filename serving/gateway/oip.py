"""The Open Inference Protocol v2: inference.GRPCInferenceService, as Triton's clients speak it."""

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from importlib import metadata as packages

from google.protobuf.message import Message

from protos.inference import grpc_service_pb2 as wire
from serving.engine.news import Output
from serving.errors import InvalidArgumentError, RequestError
from serving.gateway import convert
from serving.gateway.fleet import Fleet
from serving.gateway.keys import credential_of
from serving.gateway.merge import merged
from serving.gateway.metrics import GatewayMetrics
from serving.gateway.oip_convert import (
    INPUTS,
    OUTPUTS,
    VERSION,
    Answer,
    Infer,
    check_version,
    infer_from,
    response_from,
)
from serving.gateway.oip_sequences import Sequences
from serving.gateway.requests import Piece, Requests
from serving.gateway.status import status_of

log = logging.getLogger("fathom.gateway")

Metadata = Mapping[str, str]
SERVICE = wire.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name


class Oip:
    """The methods of the service, as `Rpc` calls them."""

    def __init__(self, requests: Requests, fleet: Fleet, metrics: GatewayMetrics):
        self._requests = requests
        self._fleet = fleet
        self._metrics = metrics
        self._sequences = Sequences(requests, fleet)
        self.unary = {
            (SERVICE, "ServerLive"): self._server_live,
            (SERVICE, "ServerReady"): self._server_ready,
            (SERVICE, "ModelReady"): self._model_ready,
            (SERVICE, "ServerMetadata"): self._server_metadata,
            (SERVICE, "ModelMetadata"): self._model_metadata,
            (SERVICE, "ModelInfer"): self._model_infer,
            (SERVICE, "RepositoryIndex"): self._repository_index,
        }
        self.exchanges = {(SERVICE, "ModelStreamInfer"): self._model_stream_infer}

    async def _server_live(self, body: bytes, metadata: Metadata) -> Message:
        convert.parse(wire.ServerLiveRequest, body)
        return wire.ServerLiveResponse(live=True)

    async def _server_ready(self, body: bytes, metadata: Metadata) -> Message:
        convert.parse(wire.ServerReadyRequest, body)
        return wire.ServerReadyResponse(ready=all(self._fleet.replicas(name) for name in self._fleet.models))

    async def _model_ready(self, body: bytes, metadata: Metadata) -> Message:
        """As Triton answers: a model that is not there is not ready."""
        request = convert.parse(wire.ModelReadyRequest, body)
        known = request.version in ("", VERSION)
        return wire.ModelReadyResponse(ready=known and bool(self._fleet.replicas(request.name)))

    async def _server_metadata(self, body: bytes, metadata: Metadata) -> Message:
        convert.parse(wire.ServerMetadataRequest, body)
        try:
            version = packages.version("fathom-serve")
        except packages.PackageNotFoundError:  # run from its source
            version = "0"
        extensions = ["parameters", "binary_tensor_data", "model_repository"]
        return wire.ServerMetadataResponse(name="fathom", version=version, extensions=extensions)

    async def _model_metadata(self, body: bytes, metadata: Metadata) -> Message:
        request = convert.parse(wire.ModelMetadataRequest, body)
        check_version(request.version)
        caller = self._requests.keys.authenticate(credential_of(metadata))
        name = self._fleet.resolve(request.name)
        caller.check(name)
        self._fleet.describe(name)
        response = wire.ModelMetadataResponse(name=name, versions=[VERSION], platform="fathom")
        for tensor, datatype, shape in INPUTS:
            response.inputs.add(name=tensor, datatype=datatype, shape=shape)
        for tensor, datatype in OUTPUTS.items():
            response.outputs.add(name=tensor, datatype=datatype, shape=[-1])
        return response

    async def _repository_index(self, body: bytes, metadata: Metadata) -> Message:
        request = convert.parse(wire.RepositoryIndexRequest, body)
        if request.repository_name:
            raise InvalidArgumentError(
                "repository_name", request.repository_name, "there is only one, without a name"
            )
        caller = self._requests.keys.authenticate(credential_of(metadata))
        response = wire.RepositoryIndexResponse()
        for name in filter(caller.may_use, self._fleet.models):
            ready = bool(self._fleet.replicas(name))
            if ready or not request.ready:
                state, reason = (
                    ("READY", "") if ready else ("UNAVAILABLE", "loading, or its replicas are gone")
                )
                response.models.add(name=name, version=VERSION, state=state, reason=reason)
        return response

    async def _model_infer(self, body: bytes, metadata: Metadata) -> Message:
        infer = infer_from(convert.parse(wire.ModelInferRequest, body), metadata)
        if infer.stream:
            raise InvalidArgumentError("stream", True, "needs ModelStreamInfer: ModelInfer has one response")
        async with aclosing(self._responses(infer)) as responses:
            return await anext(responses)

    async def _model_stream_infer(
        self, bodies: AsyncIterator[bytes], metadata: Metadata
    ) -> AsyncGenerator[Message]:
        async def requests() -> AsyncIterator[AsyncGenerator[Message]]:
            async for body in bodies:
                yield self._answers(body, metadata)

        async with aclosing(merged(requests())) as answers:
            async for answer in answers:
                yield answer

    async def _answers(self, body: bytes, metadata: Metadata) -> AsyncGenerator[Message]:
        """All responses to one request of a stream. What goes wrong with it is told in its last one, and
        leaves the other requests alone; a client that sends `triton_grpc_error` has the stream end with a
        status instead."""
        request = wire.ModelInferRequest()
        outcome = "CANCELLED"
        try:
            request = convert.parse(wire.ModelInferRequest, body)
            async with aclosing(self._responses(infer_from(request, metadata))) as responses:
                async for response in responses:
                    yield wire.ModelStreamInferResponse(infer_response=response)
            outcome = "OK"
        except Exception as error:
            outcome = status_of(error).name
            if metadata.get("triton_grpc_error") == "true":
                raise
            if not isinstance(error, RequestError):
                log.error("%s/ModelStreamInfer failed", SERVICE, exc_info=error)
            failed = wire.ModelInferResponse(id=request.id, model_name=request.model_name)
            failed.parameters["triton_final_response"].bool_param = True
            yield wire.ModelStreamInferResponse(error_message=f"{outcome}: {error}", infer_response=failed)
        finally:
            self._metrics.ended("ModelStreamInfer", outcome)

    async def _responses(self, infer: Infer) -> AsyncGenerator[wire.ModelInferResponse]:
        """One response with everything, or one for each piece."""
        count = infer.ask.params.n
        whole = Answer([infer.echo] * count, [Output("", index) for index in range(count)])
        async with (
            self._sequences.ask(infer) as ask,
            aclosing(self._requests.generate(ask)) as pieces,
        ):
            async for piece in pieces:
                if infer.stream:
                    answer = Answer([piece.text], [piece.news])
                    yield response_from(infer, answer, last=answer.usage is not None)
                else:
                    _gather(whole, piece)
        if not infer.stream:
            yield response_from(infer, whole, last=True)


def _gather(whole: Answer, piece: Piece) -> None:
    whole.texts[piece.index] += piece.text
    out = whole.news[piece.index]
    reason = out.finish_reason  # of a continuation that has ended, while the request has not
    out.extend(piece.news)
    out.finish_reason = reason or piece.news.finish_reason
